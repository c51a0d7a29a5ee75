"""Preference models on tiny random weights of their architectures, against the formula of their releases."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from steerfm_rewards.preference import Blip, Hps, ImageReward
from torch import Tensor
from torch.nn import functional as F

import steerfm
from steerfm.rewards import RewardError
from steerfm.testing import check_reward

hps, imagereward = partial(steerfm.reward, Hps), partial(steerfm.reward, ImageReward)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "heart", "dog", "house", "an", "airplane"]
TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 128, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def levels(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def pictures(b: int = 3, side: int = 40) -> Tensor:
    """As a file holds them."""
    return (torch.rand(b, 3, side, side + 9, generator=torch.Generator().manual_seed(b)) * 255).round() / 255


@pytest.fixture(scope="module")
def architecture(tmp_path_factory) -> Iterator[str]:
    import open_clip

    file = tmp_path_factory.mktemp("configs") / "steerfm-tiny.json"
    file.write_text(json.dumps(TINY))
    open_clip.add_model_config(file)
    yield "steerfm-tiny"


@pytest.fixture(scope="module")
def hps_folder(architecture, tmp_path_factory) -> Path:
    """As the release has it: a pickled training state whose weights are of open_clip."""
    import open_clip

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hps")
    model = open_clip.create_model(architecture)
    torch.save({"epoch": 3, "name": "x", "state_dict": model.state_dict()}, folder / "HPS_v2_tiny.pt")
    return folder


@pytest.mark.parametrize("form", ["folder", "file", "safetensors"])
def test_hps_is_the_cosine_of_the_release(hps_folder, architecture, form, tmp_path):
    import open_clip

    made_of: Any = open_clip.create_model_and_transforms(architecture)
    model, _, transform = made_of
    weights = torch.load(hps_folder / "HPS_v2_tiny.pt", weights_only=True)["state_dict"]
    model.load_state_dict(weights)
    model.eval()
    place = hps_folder if form == "folder" else hps_folder / "HPS_v2_tiny.pt"
    if form == "safetensors":
        save_file(weights, tmp_path / "hps.safetensors")
        place = tmp_path
    x, prompts = pictures(), ["a red heart", "a dog", "a red heart"]
    with torch.no_grad():
        image = F.normalize(model.encode_image(torch.stack([transform(levels(picture)) for picture in x])), dim=-1)
        text = F.normalize(model.encode_text(open_clip.get_tokenizer(architecture)(prompts)), dim=-1)
    expected = (image * text).sum(1)
    made: Any = hps(folder=place, architecture=architecture)
    torch.testing.assert_close(made(x, prompts=prompts), expected, atol=2e-3, rtol=0)
    scaled: Any = hps(folder=place, architecture=architecture, temperature=None, batch=2)
    assert scaled.batch_size == 2
    torch.testing.assert_close(scaled(x, prompts=prompts), made(x, prompts=prompts) * model.logit_scale.exp().item())


def test_hps_keeps_the_contract(hps_folder, architecture):
    check_reward(hps(folder=hps_folder, architecture=architecture), (3, 40, 48))
    check_reward(hps(folder=hps_folder, architecture=architecture, prompt="a dog", temperature=None), (1, 28, 28))


def slope_is_gradient(made: Any, network: Any) -> None:
    """Against finite differences in float64, without the rounding to 8 bits."""
    x = (0.05 + 0.9 * pictures(2)).double().requires_grad_()
    network.double().preprocessing.eight_bits = False
    try:
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(made.score(x, prompts=["a dog", "a house"]).sum(), x)
        with torch.no_grad():
            ends = [made.score(x + sign * 1e-6 * direction, prompts=["a dog", "a house"]).sum() for sign in (1, -1)]
        slope = float(ends[0] - ends[1]) / 2e-6
        assert bool(gradient.isfinite().all()) and float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)
    finally:
        network.float().preprocessing.eight_bits = True


def test_hps_gradient(hps_folder, architecture):
    made: Any = hps(folder=hps_folder, architecture=architecture)
    slope_is_gradient(made, made.network())


# --- ImageReward -----------------------------------------------------------------------------------------------------
MED = {
    "vocab_size": len(WORDS), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_act": "gelu", "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "add_cross_attention": True,
    "encoder_width": 768, "architectures": ["BertModel"], "type_vocab_size": 2,
}  # fmt: skip
WIDTH = 64


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory) -> Path:
    """The names of the release: a vision transformer of one head of 64, an encoder of two layers, a head of five."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 5, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(2):
        block = {"norm1": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "norm2": (WIDTH,)}
        block |= {"mlp.fc1": (96, WIDTH), "mlp.fc2": (WIDTH, 96)}
        for name, shape in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    text = {"embeddings.word_embeddings.weight": (len(WORDS), 24), "embeddings.position_embeddings.weight": (40, 24)}
    text |= {"embeddings.LayerNorm.weight": (24,), "embeddings.LayerNorm.bias": (24,)}
    for i in range(2):
        for part, width in {"attention": 24, "crossattention": WIDTH}.items():
            layer: dict[str, tuple[int, ...]] = {
                "self.query": (24, 24),
                "self.key": (24, width),
                "self.value": (24, width),
                "output.dense": (24, 24),
            }
            layer["output.LayerNorm"] = (24,)
            for name, shape in layer.items():
                text |= {f"encoder.layer.{i}.{part}.{name}.weight": shape, f"encoder.layer.{i}.{part}.{name}.bias": shape[:1]}
        for name, shape in {"intermediate.dense": (32, 24), "output.dense": (24, 32), "output.LayerNorm": (24,)}.items():
            text |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    sizes = [24, 16, 12, 8, 4, 1]
    for number, (a, b) in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:])):
        shapes |= {f"mlp.layers.{number}.weight": (b, a), f"mlp.layers.{number}.bias": (b,)}
    shapes |= {"blip.vision_proj.weight": (4, WIDTH), "blip.text_proj.weight": (4, 24)}  # there, and not used
    weights = {
        name: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        + name.count("orm.weight")
        for name, shape in shapes.items()
    }
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def attend(x: Tensor, y: Tensor, q: Any, k: Any, v: Any, heads: int, mask: Tensor | None = None) -> Tensor:
    parts = [F.linear(z, *w).unflatten(-1, (heads, -1)).transpose(1, 2) for z, w in ((x, q), (y, k), (y, v))]
    logits = parts[0] @ parts[1].mT / math.sqrt(parts[0].shape[-1])
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -math.inf)
    return (logits.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2)


def by_hand(folder: Path, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The release's network, with functions of torch and its own names."""
    w = {name: value.float() for name, value in torch.load(folder / "ImageReward.pt", weights_only=True).items()}

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *pair(name), eps)

    v = "blip.visual_encoder."
    x = F.conv2d(x, *pair(f"{v}patch_embed.proj"), stride=16).flatten(2).mT
    x = torch.cat([w[f"{v}cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{v}pos_embed"]
    for i in range(2):
        block, y = f"{v}blocks.{i}.", norm(x, f"{v}blocks.{i}.norm1", 1e-6)
        qkv = list(zip(*(part.chunk(3) for part in pair(f"{block}attn.qkv"))))
        x = x + F.linear(attend(y, y, *qkv, heads=1), *pair(f"{block}attn.proj"))
        y = F.gelu(F.linear(norm(x, f"{block}norm2", 1e-6), *pair(f"{block}mlp.fc1")))
        x = x + F.linear(y, *pair(f"{block}mlp.fc2"))
    x = norm(x, f"{v}norm", 1e-6)
    t = "blip.text_encoder."
    h = w[f"{t}embeddings.word_embeddings.weight"][ids] + w[f"{t}embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(h, f"{t}embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{t}encoder.layer.{i}."
        for part, other, seen in (("attention", None, mask), ("crossattention", x, None)):
            q, k, val = (pair(f"{layer}{part}.self.{name}") for name in ("query", "key", "value"))
            y = attend(h, h if other is None else other, q, k, val, 2, seen)
            h = norm(h + F.linear(y, *pair(f"{layer}{part}.output.dense")), f"{layer}{part}.output.LayerNorm", 1e-12)
        y = F.linear(F.gelu(F.linear(h, *pair(f"{layer}intermediate.dense"))), *pair(f"{layer}output.dense"))
        h = norm(h + y, f"{layer}output.LayerNorm", 1e-12)
    y = h[:, 0]
    for number in (0, 2, 4, 6, 7):
        y = F.linear(y, *pair(f"mlp.layers.{number}"))
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_is_the_network_of_the_release(blip_folder):
    from torchvision import transforms as T

    made: Any = imagereward(folder=blip_folder)
    x, prompts = pictures(), ["a red heart", "a dog", "an airplane house"]
    transform = T.Compose([
        T.Resize(32, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
        T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])  # fmt: skip
    words = [[2, *(WORDS.index(word) for word in prompt.split()), 3] for prompt in prompts]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in words])
    pixels = torch.stack([torch.as_tensor(transform(levels(picture))) for picture in x])
    expected = by_hand(blip_folder, pixels, ids, (ids > 0).long())
    assert float(expected.std()) > 1e-3
    network: Any = made.network()
    torch.testing.assert_close(network.preprocessing(x), pixels, atol=0.03, rtol=0)  # of 1 to 2 levels
    torch.testing.assert_close(made(x, prompts=prompts), expected, atol=0.01 * float(expected.abs().max()), rtol=0)
    network.preprocessing, before = (lambda x: x), network.preprocessing
    try:
        torch.testing.assert_close(network(pixels, prompts), expected, atol=1e-5, rtol=1e-5)
    finally:
        network.preprocessing = before


def test_imagereward_keeps_the_contract_and_has_its_gradient(blip_folder, tmp_path):
    made: Any = imagereward(folder=blip_folder, batch=2)
    check_reward(made, (3, 40, 36))
    check_reward(imagereward(folder=blip_folder, prompt="a dog"), (1, 28, 28))
    slope_is_gradient(made, made.network())


def test_prompts_are_tokenised_once_each(blip_folder):
    made: Any = imagereward(folder=blip_folder)
    network = made.network()
    assert isinstance(network, Blip)
    network.tokens.cache_clear()
    made: Any = imagereward(folder=blip_folder)
    for _ in range(2):
        made(pictures(4), prompts=["a dog", "a dog", "a house", "a dog"])
    assert network.tokens.cache_info().misses == 2


def test_what_is_wrong_with_a_folder_is_said_at_once(blip_folder, hps_folder, architecture, tmp_path, monkeypatch):
    import shutil

    for make in (imagereward, hps):
        with pytest.raises(RewardError, match=r"no folder .*nowhere: give the folder of its release with folder="):
            make(folder=tmp_path / "nowhere")
        with pytest.raises(RewardError, match="no weights in"):
            make(folder=tmp_path)
    with pytest.raises(RewardError, match=r"is no ViT-H-14 .*architecture= names another"):
        hps(folder=hps_folder)
    with pytest.raises(RewardError, match=r"no architecture 'ViT-H-15'; nearest: .*ViT-H-14"):
        hps(folder=hps_folder, architecture="ViT-H-15")
    with pytest.raises(RewardError, match=r"steerfm-tiny \(visual\.conv1\.weight is missing\)"):
        hps(folder=blip_folder, architecture=architecture)
    for name in ("med_config.json", "vocab.txt"):
        folder = tmp_path / name
        shutil.copytree(blip_folder, folder)
        (folder / name).unlink()
        with pytest.raises(RewardError, match=f"no {name}.* in .*: put it beside ImageReward.pt"):
            imagereward(folder=folder)
    folder = tmp_path / "other"
    shutil.copytree(blip_folder, folder)
    shutil.copy(hps_folder / "HPS_v2_tiny.pt", folder / "ImageReward.pt")
    with pytest.raises(RewardError, match=r"is no ImageReward \(blip"):
        imagereward(folder=folder)
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(RewardError, match="2 files of weights"):
        imagereward(folder=folder)
    (folder / "ImageReward.pt").unlink()
    with pytest.raises(RewardError, match=r"cannot read .*more.safetensors"):
        imagereward(folder=folder)
    monkeypatch.setattr("steerfm_rewards.preference.find_spec", lambda name: None)
    with pytest.raises(RewardError, match="pip install transformers"):
        imagereward(folder=blip_folder)


def test_weights_of_another_size_are_one_line(blip_folder, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(blip_folder, folder)
    (folder / "med_config.json").write_text(json.dumps(MED | {"intermediate_size": 31}))
    with pytest.raises(RewardError, match="'imagereward': cannot load") as error:
        imagereward(folder=folder, prompt="a dog")(pictures())
    assert "\n" not in str(error.value)
