"""Models of what people prefer, from folders of their releases: HPSv2 on open_clip, ImageReward on transformers' BLIP."""

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
    """The one file of weights in a folder, or the file itself.

    Raises:
        RewardError: no such folder, none of these files, or several.
    """
    place = Path(folder)
    if place.is_file() and place.suffix in WEIGHTS:
        return place
    if not place.is_dir():
        raise RewardError(f"reward {name!r}: no folder {place}: folder= takes the one that its release was put into")
    files = sorted(path for path in place.iterdir() if path.suffix in WEIGHTS)
    if len(files) != 1:
        what = f"{len(files)} files of weights ({', '.join(path.name for path in files[:3])})" if files else "no weights"
        raise RewardError(
            f"reward {name!r}: {what} in {place}: put one {', '.join(WEIGHTS[:2])} file there, or name it, folder="
        )
    return files[0]


def read_weights(name: str, file: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by name, without what training put around them; mapped, not read.

    Raises:
        RewardError: a file that holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(file)
        else:
            try:
                weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # of before torch 1.6
                weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        return {key.removeprefix("module."): value for key, value in weights.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise RewardError(f"reward {name!r} cannot read {file}: {' '.join(str(error).split())[:200]}") from None


class Hps(ClipReward):
    """Human preference score, version 2: cosine of picture and prompt in a CLIP that was tuned on choices of people.

    Unit: cosine; the release gives the same number. Gradient: yes, through the preprocessing. Pictures: 1 or 3 channels, any
    size. (Wu et al. 2306.09341; tested with small random weights of its architecture.)

    Args:
        folder: with the release's file of weights (HPS_v2.1_compressed.pt), that file, or a folder that open_clip wrote.
        prompt: for all pictures; None for the prompt that each was asked for.
        architecture: of the weights, as open_clip calls it.
        temperature: factor of the cosine; None for the model's own, which the preferences were learnt with.
        batch: pictures a call; None for all.

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
    """Refuse a file of another model before anything is built.

    Raises:
        RewardError: naming what differs.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        near = encoders.nearest(architecture, open_clip.list_models())
        raise RewardError(f"reward {name!r}: open_clip has no architecture {architecture!r}; nearest: {near}")
    weights = read_weights(name, file)
    wanted = {
        "visual.conv1.weight": (0, config["vision_cfg"].get("width")),
        "token_embedding.weight": (1, config["text_cfg"].get("width")),
        "text_projection": (1, config["embed_dim"]),
    }
    for key, (axis, width) in wanted.items():
        size = weights[key].shape[axis] if key in weights else None
        if width is not None and size != width:
            what = "is missing" if size is None else f"has a width of {size}, not {width}"
            raise RewardError(f"reward {name!r}: {file} is no {architecture} ({key} {what}): architecture= names another")


class ImageReward(LateReward):
    """ImageReward: a BLIP that reads the prompt while it looks at the picture, and a head that gives one number.

    Unit: standard deviations of the score over the release's own pictures. Gradient: yes, through the preprocessing. Pictures:
    1 or 3 channels, any size. (Xu et al. 2304.05977; tested with small random weights of its architecture.)

    Args:
        folder: with the release's ImageReward.pt (or as .safetensors), med_config.json, and the tokenizer of
            bert-base-uncased: vocab.txt, or tokenizer.json. Nothing is fetched.
        prompt: for all pictures; None for the prompt that each was asked for.
        batch: pictures a call; None for all.

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
    """The release's network: vision tower, text encoder that attends to it, and head; frozen.

    Args:
        vision, text: transformers' BlipVisionModel and BlipTextModel.
        head: features of the first token to (b, 1).
        tokenizer: of the text encoder.
        size: side of its pictures.
    """

    mean, std = 0.16717362830052426, 1.0333394966054072  # of the release
    length = 35  # tokens a prompt

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Any, size: int) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.preprocessing = encoders.Preprocessing((size, size), *encoders.OPENAI)
        self.tokens = lru_cache(maxsize=4096)(self._tokens)
        self.eval().requires_grad_(False)

    def _tokens(self, prompt: str) -> tuple[list[int], list[int]]:
        made = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=self.length)
        return made["input_ids"], made["attention_mask"]

    def forward(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Pictures (b, 1 or 3, h, w) in [0, 1] and a prompt for each -> (b,)."""
        pixels = self.preprocessing(pictures).to(next(self.vision.parameters()).dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        ids, mask = (torch.tensor(part, device=seen.device) for part in zip(*map(self.tokens, prompts)))
        states = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state  # fmt: skip
        first = states[:, 0].to(next(self.head.parameters()).dtype)
        return (self.head(first).squeeze(1) - self.mean) / self.std


RENAMED = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.qkv": ".self_attn.qkv",
    r"\.attn\.proj": ".self_attn.projection",
    r"\.norm([12])": r".layer_norm\1",
    r"^norm\.": "post_layernorm.",
}
"""Names of BLIP's vision transformer to those of transformers."""


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
    for pattern, name in RENAMED.items():
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
        told = json.loads((folder / "med_config.json").read_text())
        known = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "max_position_embeddings", "layer_norm_eps",
        )  # fmt: skip
        config = BlipTextConfig(**{key: told[key] for key in known if key in told}, encoder_hidden_size=width, is_decoder=True)
        text = BlipTextModel(config, add_pooling_layer=False)
        vision.load_state_dict(pictures)
        text.load_state_dict(words)
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load {file}: {' '.join(str(error).split())[:200]}") from None
    return Blip(vision, text, linear_layers("imagereward", head, file), tokenizer, side)
