"""Models of human preference, from the folders of their releases: HPSv2 on open_clip, ImageReward on transformers' BLIP."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfm import encoders
from steerfm.rewards import Prompts, RewardError
from steerfm_rewards.checks import check_pictures
from steerfm_rewards.clip import ClipReward, linear_layers
from steerfm_rewards.late import LateReward

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def weights_in(name: str, folder: str | Path) -> Path:
    """Return the single file of weights in a folder, or ``folder`` itself if it is such a file.

    Raises:
        RewardError: there is no such folder, or it does not hold exactly one file of weights.
    """
    place = Path(folder)
    if place.is_file() and place.suffix in WEIGHTS:
        return place
    if not place.is_dir():
        raise RewardError(f"reward {name!r}: no folder {place}: give the folder of its release with folder=")
    files = sorted(path for path in place.iterdir() if path.suffix in WEIGHTS)
    if len(files) != 1:
        what = f"{len(files)} files of weights ({', '.join(path.name for path in files[:3])})" if files else "no weights"
        raise RewardError(
            f"reward {name!r}: {what} in {place}: put one {', '.join(WEIGHTS[:2])} file there, or name the file with folder="
        )
    return files[0]


def read_weights(name: str, file: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file by name, without training state; memory-mapped where possible.

    Raises:
        RewardError: the file cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(file)
        else:
            try:
                weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a file of torch before 1.6
                weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        return {key.removeprefix("module."): value for key, value in weights.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise RewardError(f"reward {name!r} cannot read {file}: {' '.join(str(error).split())[:200]}") from None


class Hps(ClipReward):
    """Human preference score, version 2: cosine of picture and prompt in a CLIP fine-tuned on human choices.

    Unit: cosine, the same number as the release's. Gradient: yes, through the preprocessing. Pictures: 1 or 3 channels, any
    size. (Wu et al. 2306.09341; tested with small random weights of its architecture.)

    Args:
        folder: folder of the release's weights (HPS_v2.1_compressed.pt), that file, or a folder that open_clip wrote.
        prompt: prompt of all pictures; None for each picture's own prompt.
        architecture: open_clip's name of the architecture.
        temperature: factor of the cosine; None for the model's own, with which the preferences were trained.
        batch: pictures per call; None for all.

    >>> steerfm.reward("hps", folder="models/HPSv2")
    """

    name, unit, range = "hps", "cosine x temperature", (-float("inf"), float("inf"))

    def __init__(
        self,
        folder: str | Path,
        prompt: str | None = None,
        architecture: str = "ViT-H-14",
        temperature: float | None = 1.0,
        batch: int | None = None,
    ) -> None:
        if (Path(folder) / "open_clip_config.json").is_file():
            super().__init__(str(folder), None)
        else:
            file = weights_in(self.name, folder)
            super().__init__(architecture, str(file))
            _check_architecture(self.name, architecture, file)
        self.ask(prompt)
        self.temperature, self.batch_size = temperature, batch

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) and, without a prompt of its own, prompts -> (b,)."""
        cosine = self.likeness(self.image(images), prompts)
        return cosine * (self.network(images.device).scale if self.temperature is None else self.temperature)


def _check_architecture(name: str, architecture: str, file: Path) -> None:
    """Check that a file of weights has this architecture, before anything is built.

    Raises:
        RewardError: it has another one. The message names what differs.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        near = encoders.nearest(architecture, open_clip.list_models())
        raise RewardError(f"reward {name!r}: open_clip has no architecture {architecture!r}; nearest: {near}")
    weights = read_weights(name, file)
    expected = {
        "visual.conv1.weight": (0, config["vision_cfg"].get("width")),
        "token_embedding.weight": (1, config["text_cfg"].get("width")),
        "text_projection": (1, config["embed_dim"]),
    }
    for key, (axis, width) in expected.items():
        size = weights[key].shape[axis] if key in weights else None
        if width is not None and size != width:
            what = "is missing" if size is None else f"has a width of {size}, not {width}"
            raise RewardError(f"reward {name!r}: {file} is no {architecture} ({key} {what}): architecture= names another")


class ImageReward(LateReward):
    """ImageReward: a BLIP whose text encoder attends to the picture, with a head that returns one number.

    Unit: standard deviations of the score over the release's own pictures. Gradient: yes, through the preprocessing. Pictures:
    1 or 3 channels, any size. (Xu et al. 2304.05977; tested with small random weights of its architecture.)

    Args:
        folder: folder with the release's ImageReward.pt (or as .safetensors), med_config.json, and the tokenizer of
            bert-base-uncased: vocab.txt, or tokenizer.json. Nothing is downloaded.
        prompt: prompt of all pictures; None for each picture's own prompt.
        batch: pictures per call; None for all.

    >>> steerfm.reward("imagereward", folder="models/ImageReward")
    """

    name, unit, range = "imagereward", "standard deviations", (-float("inf"), float("inf"))
    packages = ("transformers",)

    def __init__(self, folder: str | Path, prompt: str | None = None, batch: int | None = None) -> None:
        super().__init__()
        self.folder, self.prompt, self.batch_size = Path(folder), prompt, batch
        self.needs = frozenset({"prompts"} if prompt is None else ())
        self.file = weights_in(self.name, folder)
        place = self.folder if self.folder.is_dir() else self.folder.parent
        for names in (("med_config.json",), ("vocab.txt", "tokenizer.json")):
            if not any((place / name).is_file() for name in names):
                raise RewardError(f"reward 'imagereward': no {' or '.join(names)} in {place}: put it beside {self.file.name}")
        if find_spec("transformers") is None:
            raise RewardError("reward 'imagereward' needs a package: pip install transformers")
        keys = read_weights(self.name, self.file)
        for key in (
            "blip.visual_encoder.pos_embed",
            "blip.text_encoder.embeddings.word_embeddings.weight",
            "mlp.layers.0.weight",
        ):
            if key not in keys:
                raise RewardError(f"reward 'imagereward': {self.file} is no ImageReward ({key} is missing)")

    def load(self) -> nn.Module:
        return _blip(self.file)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) and, without a prompt of its own, prompts -> (b,)."""
        check_pictures(self.name, images)
        words = [self.prompt] * len(images) if self.prompt is not None else list(prompts or ())
        try:
            return self.network(images.device)(images, words)
        except ValueError as error:
            raise RewardError(f"reward 'imagereward': {error}") from None


class Blip(nn.Module):
    """The release's network, frozen: vision tower, text encoder with cross-attention to it, and head.

    Args:
        vision: transformers' BlipVisionModel.
        text: transformers' BlipTextModel.
        head: maps features of the first token to (b, 1).
        tokenizer: tokenizer of the text encoder.
        size: side of the pictures, in pixels.
    """

    mean, std = 0.16717362830052426, 1.0333394966054072  # from the release
    length = 35  # tokens per prompt

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Any, size: int) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.preprocessing = encoders.Preprocessing((size, size), *encoders.OPENAI)
        self.tokens = lru_cache(maxsize=4096)(self._tokens)
        self.eval().requires_grad_(False)

    def _tokens(self, prompt: str) -> tuple[list[int], list[int]]:
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=self.length)
        return tokens["input_ids"], tokens["attention_mask"]

    def forward(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Pictures (b, 1 or 3, h, w) in [0, 1] and a prompt for each -> (b,)."""
        pixels = self.preprocessing(pictures).to(next(self.vision.parameters()).dtype)
        features = self.vision(pixel_values=pixels).last_hidden_state
        ids, mask = (torch.tensor(part, device=features.device) for part in zip(*map(self.tokens, prompts)))
        states = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
        ).last_hidden_state  # fmt: skip
        first = states[:, 0].to(next(self.head.parameters()).dtype)
        return (self.head(first).squeeze(1) - self.mean) / self.std


LAYER_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.qkv": ".self_attn.qkv",
    r"\.attn\.proj": ".self_attn.projection",
    r"\.norm([12])": r".layer_norm\1",
    r"^norm\.": "post_layernorm.",
}
"""Layer names of BLIP's vision transformer, as patterns, to those of transformers."""


@lru_cache(maxsize=2)
def _blip(file: Path) -> Blip:
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    weights, folder = read_weights("imagereward", file), file.parent
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key, value in weights.items():
        for prefix, part in parts.items():
            if key.startswith(prefix) and not key.endswith("position_ids"):
                part[key.removeprefix(prefix)] = value.float()
    pictures, words, head = parts.values()
    for pattern, name in LAYER_NAMES.items():
        pictures = {re.sub(pattern, name, key): value for key, value in pictures.items()}
    try:
        patch, inner = pictures["embeddings.patch_embedding.weight"], pictures["encoder.layers.0.mlp.fc1.weight"]
        width, side = inner.shape[1], round((pictures["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch.shape[-1]
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width, intermediate_size=len(inner), num_attention_heads=width // 64, image_size=side,
                num_hidden_layers=len({key.split(".")[2] for key in pictures if key.startswith("encoder.layers.")}),
                patch_size=patch.shape[-1], layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        settings = json.loads((folder / "med_config.json").read_text())
        keys = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "max_position_embeddings", "layer_norm_eps",
        )  # fmt: skip
        sizes = {key: settings[key] for key in keys if key in settings}
        config = BlipTextConfig(**sizes, encoder_hidden_size=width, is_decoder=True)
        text = BlipTextModel(config, add_pooling_layer=False)
        vision.load_state_dict(pictures)
        text.load_state_dict(words)
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load {file}: {' '.join(str(error).split())[:200]}") from None
    return Blip(vision, text, linear_layers("imagereward", head, file), tokenizer, side)
