"""Encoders of prompts and pictures: any open_clip model, shipped or your own, and those of plug-ins.

>>> clip = encoders.open_clip("emoji-clip")                          # shipped; or a folder with open_clip_config.json
>>> clip = encoders.open_clip("ViT-B-32", "laion2b_s34b_b79k")       # an architecture and a tag, or a file of weights
>>> clip.encode_text(["a red heart"]), clip.encode_image(pictures)   # (1, d), (b, d), of length 1

Heavy packages are imported on first use.
"""

from __future__ import annotations

import difflib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from steerfm import files, plugins
from steerfm.randomness import untouched

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue in CLIP, BLIP and their successors."""


@dataclass
class Preprocessing:
    """The preprocessing of a model's pictures, as in open_clip's ``preprocess_cfg``.

    Attributes:
        size: (height, width) of the input.
        mean: of red, green and blue.
        std: of red, green and blue.
        interpolation: "bilinear" or "bicubic".
        resize_mode: "shortest" or "longest" side to ``size``, or "squash".
        fill_color: of the border, 0 to 255.
        eight_bits: round pictures to 8 bits, as in a file, and as Pillow does before and after each pass. Gradients pass
            through the rounding. Networks react to single levels, so without it scores differ by 1e-2.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    eight_bits: bool = True

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (b, c, h, w) in [0, 1] to (b, 3, *size), normalised: open_clip's transform, on tensors, with a gradient.

        Grey pictures are repeated. Resizing is antialiased and clipped, one side after the other, as Pillow's is, in the order
        of Pillow 13, whichever release is installed: scores do not depend on it.
        """
        x = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
        if x.shape[1] != 3:
            raise ValueError(f"pictures have {x.shape[1]} channels: an open_clip model takes 1 (grey) or 3")
        h, w = x.shape[-2:]
        ratios = self.size[0] / h, self.size[1] / w
        if self.resize_mode == "squash":
            new = self.size
        elif self.resize_mode == "shortest":  # rounded down, as torchvision does
            new = tuple(
                size if ratio == max(ratios) else int(side * max(ratios))
                for side, size, ratio in zip((h, w), self.size, ratios)
            )
        else:
            new = (round(h * min(ratios)), round(w * min(ratios)))
        x = self._round(x)
        if new != (h, w):
            mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
            columns_first = new[0] < h and new[0] * w < 0.95 * new[1] * h  # from 13 on Pillow shrinks the longer side first
            for side in ((new[0], w) if columns_first else (h, new[1]), new):
                x = self._round(F.interpolate(x, side, mode=mode, antialias=True, align_corners=False).clamp(0, 1))
        dh, dw = self.size[0] - new[0], self.size[1] - new[1]
        if dh or dw:  # negative padding crops to the centre
            top, left = _half(dh), _half(dw)
            x = F.pad(x, (left, dw - left, top, dh - top), value=self.fill_color / 255)
        mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def _round(self, x: Tensor) -> Tensor:
        return x + ((x * 255).round() / 255 - x).detach() if self.eight_bits else x


def _half(n: int) -> int:
    return n // 2 if n >= 0 else -round(-n / 2)


class OpenClip(nn.Module):
    """An open_clip model with its tokenizer and its preprocessing; frozen.

    Args:
        model: the open_clip model.
        tokenizer: texts to (n, context) int64.
        preprocessing: of its pictures.
        name: for messages.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, preprocessing: Preprocessing, name: str) -> None:
        super().__init__()
        self.model: Any
        self.model, self.tokenizer, self.preprocessing, self.name = model, tokenizer, preprocessing, name
        self.has_warned = False
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> OpenClip:
        return super().train(False)  # always frozen

    @property
    def scale(self) -> float:
        """The trained inverse temperature of the cosines."""
        return float(self.model.logit_scale.exp())

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings (n, d) of length 1, without a gradient. Long prompts are cut, with one warning."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(list(prompts))
        if not self.has_warned:
            for prompt, row in zip(prompts, tokens):
                if bool(row[-1] != 0) and _is_too_long(self.tokenizer, prompt, tokens.shape[1]):
                    warnings.warn(f"{self.name} reads {tokens.shape[1]} tokens: the rest of {prompt!r} is cut", stacklevel=3)
                    self.has_warned = True
                    break
        with torch.no_grad():
            return F.normalize(self.model.encode_text(tokens.to(device)).float(), dim=-1)

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Pictures (b, c, h, w) in [0, 1] to embeddings (b, d) of length 1; differentiable."""
        weight = next(self.model.parameters())
        x = self.preprocessing(pictures).to(weight.dtype)
        embedding = self.model.encode_image(x)
        return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=-1)


class ReadsTexts(Protocol):
    """An encoder of texts."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings (n, d) of length 1."""
        ...


def text_encoders() -> dict[str, Callable[[], ReadsTexts]]:
    """Text-only encoders of plug-ins, by name; they load when they are called."""
    plug_ins = {name: point.load() for name, point in plugins.encoders().items()}
    return {name: make for name, make in plug_ins.items() if hasattr(make, "encode_text") and not hasattr(make, "encode_image")}


class TextEncoder:
    """Encodes the prompts of a flow map as its condition; the encoder loads on first use.

    Args:
        model: a shipped name or a folder for `open_clip`, or a name in `text_encoders`.
        width: size d of its embeddings.
    """

    def __init__(self, model: str, width: int) -> None:
        self.model, self.width = model, width
        self._encoder: ReadsTexts | None = None

    @classmethod
    def of(cls, model: str) -> TextEncoder:
        """The encoder of a model, with the model's width."""
        encoder = cls(model, 1)
        encoder.width = encoder([""]).shape[1]
        return encoder

    @property
    def has_image_tower(self) -> bool:
        """Whether its model encodes pictures as well, as those of `open_clip` do."""
        return self.model not in text_encoders()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(n, d) float32 on the CPU, entries of unit mean square; zeros for the empty prompt: the null condition."""
        with torch.inference_mode(False):  # the rows may be used later in runs with a gradient
            if self._encoder is None:
                self._encoder = text_encoders().get(self.model, partial(open_clip, self.model))()
            rows = self._encoder.encode_text(prompts) * self.width**0.5
            return rows * torch.tensor([[float(bool(prompt.strip()))] for prompt in prompts])


def _is_too_long(tokenizer: Any, prompt: str, length: int) -> bool:
    encode = getattr(tokenizer, "encode", None)
    return encode is None or len(encode(prompt)) + 2 > length


def open_clip(model: str, pretrained: str | None = None, device: str | torch.device = "cpu") -> OpenClip:
    """Load an open_clip model.

    Args:
        model: a shipped name (``emoji-clip``), a folder with ``open_clip_config.json``, or an architecture of open_clip.
        pretrained: with an architecture: a tag of open_clip (downloaded once) or a file of weights.
        device: of the model.

    Raises:
        FileNotFoundError: the weights are missing; the message says which file to put where.
        ValueError: there is no such architecture or tag; the message lists the nearest ones.
    """
    import open_clip as oc

    places = (plugins.model_folder(model), Path(model.removeprefix("local-dir:")))
    folder = next((f for f in places if f is not None and (f / "open_clip_config.json").is_file()), None)
    with quiet(), untouched():  # random weights are drawn, then replaced
        if folder is not None:
            return _own_open_clip(oc, folder, device, model)
        _check_architecture(oc, model, pretrained)
        try:
            net = oc.create_model(model, pretrained=pretrained, device=str(device))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise FileNotFoundError(
                f"cannot load the weights {pretrained!r} of {model} ({type(error).__name__}: {reason}): without "
                "internet access, get that tag's open_clip_model.safetensors elsewhere, and pass its path as pretrained="
            ) from None
        return OpenClip(net, oc.get_tokenizer(model), preprocessing(_preprocess_cfg(net)), f"{model}/{pretrained}")


def _own_open_clip(oc: Any, folder: Path, device: str | torch.device, name: str) -> OpenClip:
    """The model of a folder. open_clip itself would accept missing weights and leave them random.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the weights do not fit, or are not finite.
    """
    file = folder / "open_clip_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no weights: put open_clip_model.safetensors beside open_clip_config.json")
    source = f"local-dir:{folder}"
    _check_config(folder / "open_clip_config.json")
    try:
        net = oc.create_model(source, device=str(device))
        weights, tokens, prepare = load_file(file), oc.get_tokenizer(source), preprocessing(_preprocess_cfg(net))
        state = net.state_dict()
        unfit = [key for key in state.keys() ^ weights.keys() if not (key.endswith(("position_ids", "num_batches_tracked")))]
        unfit += [key for key in state.keys() & weights.keys() if state[key].shape != weights[key].shape]
        unfit += [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
    except Exception as error:
        raise ValueError(f"corrupt model {folder}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    if unfit:
        raise ValueError(f"corrupt model {file}: {sorted(unfit)[0]} is missing, of another shape, unknown or not finite")
    return OpenClip(net, tokens, prepare, name)


def _check_config(file: Path) -> None:
    """Check values that would fail only later in open_clip, or that would make it download or run code.

    Raises:
        ValueError: naming the file and the key.
    """

    def number(text: str) -> None:
        raise ValueError(f"it holds {text}")

    def sizes(value: Any) -> bool:
        pair = value if isinstance(value, list) and len(value) == 2 else [value]
        return all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= 4096 for n in pair)

    def numbers(value: Any, least: float) -> bool:
        good = isinstance(value, list) and len(value) == 3
        return good and all(isinstance(n, int | float) and not isinstance(n, bool) and least < n < 1e6 for n in value)

    try:
        config = json.loads(file.read_text(), parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"corrupt model {file}: {' '.join(str(error).split())}") from None
    parts: dict[str, Any] = {"": config}
    for key in ("model_cfg", "preprocess_cfg", "model_cfg.vision_cfg", "model_cfg.text_cfg"):
        above, _, last = key.rpartition(".")
        parts[key] = parts[above].get(last, {} if key == "preprocess_cfg" else None) if isinstance(parts[above], dict) else None
        if not isinstance(parts[key], dict):
            raise ValueError(f"corrupt model {file}: {key} is {json.dumps(parts[key])[:80]}, it should be a dictionary")
    vision, prepare, text = parts["model_cfg.vision_cfg"], parts["preprocess_cfg"], parts["model_cfg.text_cfg"]
    checks = {
        "vision_cfg.image_size": (sizes(vision.get("image_size", 224)), "one side of at most 4096, or height and width"),
        "vision_cfg.timm_model_name": (":" not in str(vision.get("timm_model_name")), "the name of a network, not an address"),
        "text_cfg.tokenizer_kwargs": ("trust_remote_code" not in json.dumps(text), "without trust_remote_code"),
        "preprocess_cfg.size": (sizes(prepare.get("size", 224)), "one side of at most 4096, or height and width"),
        "preprocess_cfg.mean": (numbers(prepare.get("mean", [0, 0, 0]), -1e6), "three numbers"),
        "preprocess_cfg.std": (numbers(prepare.get("std", [1, 1, 1]), 0), "three numbers above 0"),
        "preprocess_cfg.resize_mode": (
            prepare.get("resize_mode", "shortest") in ["shortest", "longest", "squash"], "shortest, longest or squash"
        ),
    }  # fmt: skip
    for key, (is_good, words) in checks.items():
        if not is_good:
            raise ValueError(f"corrupt model {file}: {key} should be {words}")


def nearest(word: str, choices: Sequence[str], n: int = 3, cutoff: float = 0.3) -> str:
    """The choices nearest to a word, as a text.

    Args:
        word: the word.
        choices: the valid words.
        n: most choices to return.
        cutoff: least similarity, from 0 to 1.
    """
    return ", ".join(difflib.get_close_matches(word, choices, n, cutoff)) or "none"


def shipped() -> list[str]:
    """The names of the open_clip models in plug-ins."""
    return [path.parent.name for folder in plugins.folders() for path in folder.glob("*/open_clip_config.json")]


def _check_architecture(oc: Any, model: str, pretrained: str | None) -> None:
    if "/" in model or model.startswith("local-dir:"):
        raise FileNotFoundError(f"no open_clip_config.json in {model}: give a folder that open_clip wrote, or an architecture")
    if model not in oc.list_models():
        names = [*shipped(), *text_encoders()]
        near = nearest(model, [*names, *oc.list_models()])
        raise ValueError(f"unknown open_clip model {model!r}; nearest: {near}; shipped: {', '.join(names)}")
    if not pretrained:
        tags = oc.list_pretrained_tags_by_model(model)
        raise ValueError(
            f"open_clip model {model!r} needs weights: pretrained=TAG or a file; tags: {', '.join(tags) or 'none'}"
        )
    is_file_name = Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors") or "/" in pretrained
    if is_file_name and not Path(pretrained).is_file():
        raise FileNotFoundError(f"no file {pretrained}: put the weights of {model} there, or give a tag of open_clip")
    tags = oc.list_pretrained_tags_by_model(model)
    if not is_file_name and pretrained not in tags:
        raise ValueError(
            f"open_clip model {model!r} has no tag {pretrained!r}; nearest: {nearest(pretrained, tags)}; or pass a file"
        )


class quiet:
    """A context without logging: open_clip writes to the root logger at every load."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.before)


def _preprocess_cfg(net: Any) -> Mapping[str, Any]:
    return net.visual.preprocess_cfg


def build(model_cfg: Mapping[str, Any]) -> nn.Module:
    """An open_clip model of a custom configuration, with random weights; its trunk is pretrained if a plug-in has it.

    Args:
        model_cfg: open_clip's ``model_cfg``: embed_dim, vision_cfg, text_cfg.

    Raises:
        ImportError: the package with the trunk's weights is missing; the message names it.
    """
    import open_clip as oc

    with quiet():
        arguments: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in model_cfg.items()}
        net: Any = oc.CLIP(**arguments)
    trunk = plugins.encoders().get(model_cfg["vision_cfg"].get("timm_model_name"))
    if trunk is not None:
        weights, own = trunk.load()().state_dict(), net.visual.trunk.state_dict()
        net.visual.trunk.load_state_dict({key: weights[key] for key in own})
    return net


def tokenizer(model_cfg: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    """open_clip's own tokenizer, cut to the context of a custom configuration."""
    import open_clip as oc

    return oc.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])


def preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing of open_clip's ``preprocess_cfg``."""
    size = config["size"]
    return Preprocessing(
        (size, size) if isinstance(size, int) else tuple(size), config["mean"], config["std"], config["interpolation"],
        config["resize_mode"], config.get("fill_color", 0),
    )  # fmt: skip


def for_file(tensors: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    """Tensors ready for a file: on the CPU, contiguous, floats as float16 if ``half``."""
    weights = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return {name: value.half() if half and value.is_floating_point() else value for name, value in weights.items()}


def save_open_clip(
    model: nn.Module, folder: str | Path, model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], half: bool = True
) -> Path:
    """Write a folder for ``open_clip.create_model("local-dir:<folder>")``, and return it."""
    folder = Path(folder)
    files.write_tensors(folder / "open_clip_model.safetensors", for_file(model.state_dict(), half))
    config = {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)}
    files.write(folder / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    return folder


class Cached:
    """A frozen function of pictures, (b, c, h, w) to (b, d), with a cache: each picture is computed once."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.features = function, {}

    def __call__(self, pictures: Tensor) -> Tensor:
        keys = [hash(picture.cpu().numpy().tobytes()) for picture in pictures]
        new = [i for i, key in enumerate(keys) if key not in self.features]
        if new:
            with torch.no_grad():
                self.features |= dict(zip((keys[i] for i in new), self.function(pictures[new])))
        return torch.stack([self.features[key] for key in keys])
