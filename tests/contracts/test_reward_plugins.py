"""Every installed reward through one contract, and the first-party ones against values computed another way."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kinds import a, classifier, sure
from PIL import Image
from reward_helpers import clip_folder, head_file, server_of
from steerfm_rewards.clip import Clip
from steerfm_rewards.inverse import TargetImage
from torch import Tensor

from steerfm.checkpoints import build_network, save_weights
from steerfm.randomness import stream
from steerfm.rewards import Reward, RewardError, available, reward
from steerfm.testing import check_reward

SHAPE = (1, 28, 28)
FIRST_PARTY = {
    "aesthetic", "brightness", "classifier", "clip", "clip_direction", "compressibility", "diversity", "emoji_judge",
    "ensemble", "frames",
    "hps", "image_quality", "imagenet", "imagereward", "judge", "normalised", "objects", "ocr",
    "pickscore", "remote", "sharpness", "symmetry",
    "target_image", "vlm",
}  # fmt: skip


def pictures(b: int = 6, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """Uniform noise in [0.05, 0.95]: a small step in any direction stays a picture."""
    return 0.05 + 0.9 * torch.rand(b, *shape, generator=torch.Generator().manual_seed(seed))


TARGET = pictures(1, seed=9)[0]
ARGUMENTS: dict[str, list[dict]] = {
    "classifier": [{"target": "Bag"}, {"target": 3}, {}],
    "judge": [{"target": "bag"}, {}],
    "compressibility": [{}, {"quality": 30}],
    "aesthetic": [{"head": head_file()}],
    "clip": [{"prompt": "red heart"}, {}, {"prompt": "red heart", "negative": "dog face", "temperature": None}],
    "clip_direction": [
        {"source": "dog face", "to": "cat face"},
        {"source": "dog face", "to": "cat face", "start": TARGET},
    ],
    "diversity": [{}, {"features": "emoji-clip"}],
    "emoji_judge": [{"prompt": "red heart"}, {}],
    "ensemble": [{"members": [{"name": "classifier", "target": "Bag"}, {"name": "judge", "target": "Bag"}, "sharpness"]}],
    "imagenet": [{"target": "wombat", "size": 64}],
    "normalised": [{"reward": "sharpness", "mean": -3.0, "std": 0.5}],
    "ocr": [{"text": "hello"}],
    "pickscore": [{"model": clip_folder(), "prompt": "red heart"}, {"model": clip_folder()}],
    "remote": [{"url": server_of("brightness")}],
    "target_image": [
        {"target": TARGET, "noise": 0.3},
        {"target": TARGET, "operator": "inpaint"},
        {"target": TARGET, "operator": "downsample", "factor": 4, "seed": 0},
        {"target": TARGET, "operator": "blur", "sigma": 1.5},
    ],
}
ELSEWHERE = {"frames", "hps", "imagereward", "objects", "vlm"}  # they have test files of their own in tests/rewards/
CASES = [(name, arguments) for name in sorted(set(available()) - ELSEWHERE) for arguments in ARGUMENTS.get(name, [{}])]
CONTEXT = {"prompts": [f"picture {i}" for i in range(6)], "labels": torch.arange(6)}


def describe(name: str, arguments: dict) -> str:
    told = (f"{key}={value}" for key, value in arguments.items() if isinstance(value, str | int | None))
    return "-".join([name, *(text for text in told if "http" not in text and "/" not in text)])


SLOW_REWARDS = {"ocr"}


@pytest.fixture(
    params=[pytest.param(case, id=describe(*case), marks=pytest.mark.slow if case[0] in SLOW_REWARDS else ()) for case in CASES]
)
def plugin(request) -> Iterator[Reward]:
    name, arguments = request.param
    made = reward(name, **arguments)
    yield made
    smooth(made, False)
    for network in networks(made):
        network.float()


def test_the_first_party_rewards_are_installed():
    assert set(available()) >= FIRST_PARTY, "run 'pip install -e .'"


# --- the contract ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_keeps_the_contract(plugin):
    check_reward(plugin, SHAPE)
    assert plugin.unit and type(plugin).__doc__


def networks(plugin: Reward) -> list[Any]:
    """Those that the reward shares with others of this process."""
    parts = [late for part in plugin.modules() for late in (part, getattr(part, "encoder", None))]
    loads = [getattr(part, "load", None) for part in parts]
    return [load() for load in loads if callable(load)]


def smooth(plugin: Reward, yes: bool) -> None:
    """Whether pictures reach the networks without being rounded to 8 bits."""
    for part in [plugin, *networks(plugin)]:
        if hasattr(part, "preprocessing"):
            part.preprocessing.eight_bits = not yes


def double(plugin: Reward) -> Reward:
    """The reward in float64, with the networks that it shares."""
    for network in networks(plugin):
        network.double()
    return copy.deepcopy(plugin).double()


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences_and_black_boxes_have_none(plugin):
    images = pictures().requires_grad_()
    smooth(plugin, True)
    value = plugin(images, **CONTEXT)
    assert value.requires_grad == plugin.differentiable
    if not plugin.differentiable:
        return
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert bool(torch.isfinite(gradient).all()) and bool((gradient.flatten(1).norm(dim=1) > 0).all())
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = double(plugin)  # in float32 the differences would be rounding
    step, rtol, atol = 1e-7, 3e-3, 1e-4
    if plugin.name.split()[0] in ("ensemble", "normalised"):  # members answer in float32
        step, rtol = 1e-3, 3e-2
    elif networks(plugin):  # deep and kinked: the gradient that is compared is of float32
        rtol, atol = 5e-2, 5e-3
    ends = [exact.score(images.detach().double() + sign * step * direction, **CONTEXT) for sign in (1, -1)]
    slope, along = (ends[0] - ends[1]).double() / (2 * step), (gradient * direction).flatten(1).sum(1)
    if plugin.groupwise:
        slope, along = slope.sum(), along.sum()
    torch.testing.assert_close(along, slope, rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_under_autocast_are_near(plugin, dtype):
    images = pictures().requires_grad_()
    with torch.autocast("cpu", dtype):
        value = plugin(images, **CONTEXT)
        (gradient,) = torch.autograd.grad(value.sum(), images) if plugin.differentiable else (torch.zeros(1),)
    value, whole = value.detach(), plugin(images.detach(), **CONTEXT)
    assert value.dtype == torch.float32 and bool(torch.isfinite(gradient).all())
    assert float((value - whole).abs().max()) < 0.25 * max(1.0, float(whole.abs().max()))


def test_words_first_met_under_one_autocast_are_used_under_another():
    """Embeddings of prompts are kept for the process, in whatever precision the first call ran."""
    words = a(Clip, reward("clip"))
    for kept, dtype in (("a snow man", torch.float16), ("a fresh egg", torch.bfloat16)):
        with torch.autocast("cpu", dtype):
            words(pictures(1), prompts=[kept])
    fresh = torch.stack([words.network().encode_text([prompt])[0] for prompt in ("a snow man", "a fresh egg")])
    torch.testing.assert_close(words.text(["a snow man", "a fresh egg"], fresh), fresh, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_values_do_not_depend_on_the_device(plugin):
    value = plugin(pictures().cuda(), prompts=CONTEXT["prompts"], labels=CONTEXT["labels"].cuda())
    assert value.is_cuda
    torch.testing.assert_close(value.cpu(), plugin(pictures(), **CONTEXT), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(FIRST_PARTY))
def test_vectors_are_refused(name):
    if name in {"remote", "ensemble", "normalised"} | ELSEWHERE:
        pytest.skip("it passes on what it is given, or is tested elsewhere")
    arguments = ARGUMENTS.get(name, [{}])[0]
    with pytest.raises(RewardError, match=f"'{name}' takes pictures"):
        reward(name, **arguments)(torch.rand(2, 3), **{key: value[:2] for key, value in CONTEXT.items()})


# --- brightness, symmetry, sharpness ---------------------------------------------------------------------------------
SHAPES = [(1, 28, 28), (3, 5, 8), (4, 1, 7), (2, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_brightness_of_constant_pictures(shape):
    levels = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(reward("brightness")(levels.view(3, 1, 1, 1).expand(3, *shape)), levels)


@pytest.mark.parametrize("shape", SHAPES)
def test_symmetry_of_mirrored_pictures(shape):
    half = pictures(4, shape)
    assert reward("symmetry")(torch.cat([half, half.flip(-1)], -1)).tolist() == [0.0] * 4
    torch.testing.assert_close(reward("symmetry")(half), reward("symmetry")(half.flip(-1)))


def test_symmetry_by_hand():
    row = torch.tensor([[[[0.0, 0.5, 1.0, 1.0]]]])  # mirror differences 1, 0.5, 0.5, 1
    torch.testing.assert_close(reward("symmetry")(row), torch.tensor([-2.5 / 4]))
    torch.testing.assert_close(reward("symmetry")((row > 0.7).float()), torch.tensor([-1.0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_sharpness_is_the_log_of_the_mean_squared_gradient(shape):
    images = pictures(3, shape)
    c, h, w = shape
    for image, value in zip(images.double(), reward("sharpness")(images)):
        energy = 0.0
        for channel in image.tolist():
            energy += sum((channel[i][j + 1] - channel[i][j]) ** 2 for i in range(h) for j in range(w - 1))
            energy += sum((channel[i + 1][j] - channel[i][j]) ** 2 for i in range(h - 1) for j in range(w))
        assert float(value) == pytest.approx(math.log(energy / (c * h * w) + 1 / 255**2), rel=1e-5)


def test_sharpness_of_a_constant_picture_is_its_floor_with_gradient_zero():
    images = torch.full((1, 1, 8, 8), 0.3, requires_grad=True)
    value = reward("sharpness")(images)
    assert value.item() == pytest.approx(-2 * math.log(255))
    assert float(torch.autograd.grad(value, images)[0].abs().max()) == 0


# --- compressibility -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 28), (3, 40)])
@pytest.mark.parametrize("quality", [20, 75])
def test_compressibility_is_the_length_of_pillows_file(channels, side, quality):
    images = pictures(3, (channels, side, side))
    for image, value in zip(images, reward("compressibility", quality=quality)(images)):
        pixels = np.round(image.numpy() * 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[0] if channels == 1 else np.moveaxis(pixels, 0, 2)).save(file, "JPEG", quality=quality)
        assert float(value) == pytest.approx(-len(file.getvalue()) / 1000)


def test_a_constant_picture_is_more_compressible_than_noise():
    flat, noise = reward("compressibility")(torch.stack([torch.full(SHAPE, 0.5), TARGET]))
    assert 0 > flat > noise


@pytest.mark.parametrize("quality", [0, 96, 7.5, "high"])
def test_compressibility_refuses_other_qualities(quality):
    with pytest.raises(RewardError, match="give an integer from 1 to 95"):
        reward("compressibility", quality=quality)


def test_compressibility_refuses_other_channels():
    with pytest.raises(RewardError, match="takes 1 or 3 channels, got 2"):
        reward("compressibility")(pictures(1, (2, 4, 4)))


# --- classifier ------------------------------------------------------------------------------------------------------
NAMES = ("T-shirt", "Bag", "Ankle boot")


@pytest.fixture(params=["resnet", "convnet"])
def checkpoint(request, tmp_path):
    """An untrained classifier of three classes: the network and its path."""
    architecture = {"name": request.param, "widths": [8, 16], "classes": 3}
    torch.manual_seed(0)
    network, path = build_network(architecture).eval(), tmp_path / "own.safetensors"
    save_weights(
        network, path, {"kind": "classifier", "network": architecture, "shape": [1, 28, 28], "class_names": NAMES}, half=False
    )
    return network, path


def test_the_classifier_is_a_log_probability(checkpoint):
    network, path = checkpoint
    images = pictures()
    with torch.no_grad():
        logits = network(images).double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for target in ("Bag", "bag", 1, "1"):
        value = reward("classifier", target=target, model=path)(images)
        np.testing.assert_allclose(value.numpy(), log_p[:, 1], rtol=1e-5)
    labels = torch.tensor([0, 2, 1, 0, 2, 1])
    rw = reward("classifier", model=str(path))
    assert rw.needs == {"labels"}
    np.testing.assert_allclose(rw(images, labels=labels).numpy(), log_p[range(6), labels], rtol=1e-5)


def test_the_classifier_is_frozen_in_evaluation_mode_and_gives_features(checkpoint):
    from steerfm.zoo import load_classifier

    network, names, _ = load_classifier(checkpoint[1])
    assert names == NAMES and not network.training and not any(p.requires_grad for p in network.parameters())
    assert classifier(checkpoint[1]).features(pictures()).shape == (6, classifier(checkpoint[1]).num_features)


def test_the_judge_is_another_classifier_by_default(checkpoint):
    rw = reward("judge", target="Bag", model=checkpoint[1])
    assert rw.name == "judge" and not rw.needs
    torch.testing.assert_close(rw(pictures()), reward("classifier", target="Bag", model=checkpoint[1])(pictures()))


def test_classifier_errors(checkpoint):
    path = checkpoint[1]
    with pytest.raises(ValueError, match="unknown class 'Bagg'; classes: 0 T-shirt, 1 Bag, 2 Ankle boot"):
        reward("classifier", target="Bagg", model=path)
    for shape in [(3, 28, 28), (1, 32, 32)]:
        with pytest.raises(RewardError, match="takes pictures of 1 x 28 x 28"):
            reward("classifier", target=0, model=path)(pictures(2, shape))
    for label in (3, -1):
        with pytest.raises(RewardError, match=r"a label outside 0..2: condition on a class, or pass target="):
            reward("classifier", model=path)(pictures(1), labels=torch.tensor([label]))
    with pytest.raises(ValueError, match="unknown model 'fashion-clasifier'"):
        reward("classifier", model="fashion-clasifier")
    with pytest.raises(FileNotFoundError, match="no such file"):
        reward("classifier", model=path.with_name("other.safetensors"))


# --- target_image ----------------------------------------------------------------------------------------------------
def operators():
    from steerfm_rewards.inverse import OPERATORS

    return OPERATORS


def slow_identity(image: np.ndarray) -> np.ndarray:
    return image


def slow_inpaint(image: np.ndarray) -> np.ndarray:
    c, h, w = image.shape
    inside = [[h // 4 <= i < h - h // 4 and w // 4 <= j < w - w // 4 for j in range(w)] for i in range(h)]
    return np.array([image[k, i, j] for k in range(c) for i in range(h) for j in range(w) if not inside[i][j]])


def slow_downsample(image: np.ndarray) -> np.ndarray:
    c, h, w = image.shape
    out = np.zeros((c, h // 2, w // 2))
    for k, i, j in np.ndindex(*out.shape):
        out[k, i, j] = (
            image[k, 2 * i, 2 * j] + image[k, 2 * i + 1, 2 * j] + image[k, 2 * i, 2 * j + 1] + image[k, 2 * i + 1, 2 * j + 1]
        ) / 4
    return out


def slow_blur(image: np.ndarray) -> np.ndarray:
    c, h, w = image.shape
    out, weights = np.zeros(image.shape), 0.0
    for di in range(-3, 4):
        for dj in range(-3, 4):
            weight = math.exp(-(di**2 + dj**2) / 2)
            weights += weight
            for k, i, j in np.ndindex(c, h, w):
                out[k, i, j] += weight * image[k, min(max(i + di, 0), h - 1), min(max(j + dj, 0), w - 1)]
    return out / weights


SLOW = {"identity": slow_identity, "inpaint": slow_inpaint, "downsample": slow_downsample, "blur": slow_blur}


@pytest.mark.parametrize("name", SLOW)
def test_operators_match_loops_and_are_linear(name):
    assert operators().keys() == SLOW.keys()
    operator, x, z = operators()[name], pictures(2, (3, 6, 8)).double(), pictures(2, (3, 6, 8), seed=1).double()
    np.testing.assert_allclose(operator(x).numpy(), np.stack([SLOW[name](image) for image in x.numpy()]), atol=1e-12)
    torch.testing.assert_close(operator(2 * x - 3 * z), 2 * operator(x) - 3 * operator(z))


@pytest.mark.parametrize("name", SLOW)
def test_the_likelihood_is_gaussian(name):
    """Up to the constant that the docstring gives, the sum of univariate normal log-densities."""
    x, noise = pictures(3, (3, 6, 8)), 0.3
    target = pictures(1, (3, 6, 8), seed=2)[0]
    value = reward("target_image", target=target, operator=name, noise=noise)(x)
    y = SLOW[name](target.double().numpy())
    for image, got in zip(x.double().numpy(), value):
        density = torch.distributions.Normal(torch.from_numpy(SLOW[name](image)), noise).log_prob(torch.from_numpy(y))
        constant = -y.size / 2 * math.log(2 * math.pi * noise**2)
        assert float(got) == pytest.approx(float(density.sum()) - constant, rel=1e-4)
    assert float(reward("target_image", target=target, operator=name)(target[None])) == 0


@pytest.mark.parametrize("name", SLOW)
def test_score_and_gradient_are_those_of_a_linear_measurement_with_noise(name):
    """y = A x* + noise with A as a matrix: log N(y; A x, noise^2 I) up to its constant, and A'(y - A x) / noise^2."""
    shape, noise = (3, 6, 8), 0.3
    truth, x = pictures(1, shape, seed=2)[0], pictures(4, shape).double().requires_grad_()
    rw = a(TargetImage, reward("target_image", target=truth, operator=name, noise=noise, seed=5))
    A = operators()[name](torch.eye(truth.numel(), dtype=torch.float64).unflatten(1, shape)).flatten(1).T
    y = rw.y.double().flatten()
    z = torch.randn(rw.y.shape, generator=stream(5, "measurement")).double().flatten()
    torch.testing.assert_close(y, A @ truth.double().flatten() + noise * z, rtol=0, atol=1e-6)
    residual = y - x.detach().flatten(1) @ A.T
    value = rw(x)
    torch.testing.assert_close(value.double(), -residual.square().sum(1) / (2 * noise**2), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient.flatten(1), residual @ A / noise**2)


def test_the_truth_is_the_full_picture_where_there_is_one():
    y = operators()["downsample"](TARGET[None])[0]
    assert sure(reward("target_image", target=TARGET, operator="downsample", seed=0).truth).equal(TARGET)
    assert reward("target_image", target=y, operator="downsample", measured=True).truth is None
    assert sure((reward("symmetry") + 2.0 * reward("target_image", target=TARGET)).truth).equal(TARGET)
    assert (reward("symmetry") + reward("sharpness")).truth is None


def test_inpainting_ignores_masked_pixels():
    x, mask = pictures(), (torch.rand(28, 28, generator=torch.Generator().manual_seed(3)) < 0.5).float()
    rw = reward("target_image", target=TARGET, operator="inpaint", mask=mask, seed=0)
    painted = torch.where(mask > 0.5, x, 1 - x).requires_grad_()
    torch.testing.assert_close(rw(painted), rw(x))
    (gradient,) = torch.autograd.grad(rw(painted).sum(), painted)
    assert bool((gradient[:, :, mask < 0.5] == 0).all() and (gradient[:, :, mask > 0.5] != 0).all())


def test_files_for_target_and_mask(tmp_path):
    levels = torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "grey.png")
    Image.fromarray(levels.unsqueeze(2).expand(28, 28, 3).numpy()).save(tmp_path / "colour.png")
    x, target = pictures(), levels.float() / 255
    path = str(tmp_path / "grey.png")
    torch.testing.assert_close(reward("target_image", target=path)(x), reward("target_image", target=target)(x))
    assert float(reward("target_image", target=tmp_path / "colour.png")(target.expand(1, 3, 28, 28))) == 0
    masked = reward("target_image", target=target, operator="inpaint", mask=tmp_path / "colour.png")
    torch.testing.assert_close(masked(x), reward("target_image", target=target, operator="inpaint", mask=target)(x))


def test_a_measurement_and_an_operator_of_your_own():
    def rows(images, sigma=1.0):
        return sigma * images.sum(-1)

    x, y = pictures(), pictures(1, (1, 14, 14))[0]
    value = reward("target_image", target=y, operator="downsample", factor=2, noise=0.5, measured=True)(x)
    torch.testing.assert_close(value, -2 * (operators()["downsample"](x) - y).square().sum((1, 2, 3)))
    value = reward("target_image", target=TARGET, operator=rows, sigma=2.0, noise=0.5)(x)
    torch.testing.assert_close(value, -2 * (2 * (x - TARGET).sum(-1)).square().sum((1, 2)))


def test_the_noise_of_a_measurement_has_a_seed_and_a_scale():
    def measured(seed: int) -> Tensor:
        return a(TargetImage, reward("target_image", target=TARGET, noise=0.2, seed=seed)).y

    first, again, other = (measured(seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert float((first - TARGET).std()) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "is missing its argument 'target'"),
        ({"target": "nowhere.png"}, "cannot read its target 'nowhere.png'"),
        ({"target": TARGET * 2 - 1}, r"takes a target \(c, h, w\) in \[0, 1\]"),
        ({"target": torch.rand(2, 1, 28, 28)}, r"takes a target \(c, h, w\)"),
        (
            {"target": TARGET, "operator": "blurr"},
            "no operator 'blurr'; operators: identity, inpaint, downsample, blur",
        ),
        ({"target": TARGET, "noise": 0.0}, "give a positive standard deviation"),
        (
            {"target": TARGET, "operator": "blur", "factor": 2},
            "operator=blur' has no argument 'factor'.*arguments: sigma",
        ),
        ({"target": TARGET, "operator": "blur", "sigma": -1.0}, "give a positive number of pixels"),
        ({"target": TARGET, "operator": "downsample", "factor": 3}, "a whole number that divides 28 and 28"),
        ({"target": TARGET, "operator": "inpaint", "mask": torch.ones(4, 4)}, "fit the mask"),
        ({"target": TARGET, "operator": "inpaint", "mask": torch.zeros(28, 28)}, "without a known pixel"),
        ({"target": TARGET, "oprator": "blur"}, "did you mean 'operator'"),
    ],
)
def test_target_image_errors(arguments, message):
    with pytest.raises(RewardError, match=message) as error:
        reward("target_image", **arguments)
    assert "\n" not in str(error.value)


def test_target_image_refuses_pictures_of_another_shape():
    with pytest.raises(RewardError, match="give a target of the model's shape"):
        reward("target_image", target=TARGET)(pictures(1, (3, 28, 28)))
