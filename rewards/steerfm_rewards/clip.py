"""Rewards that compare a picture with text: any open_clip model, and heads on top of one.

Pictures go to the model as tensors, with a gradient, through the same resizing, cropping and normalisation as open_clip's own
transform of PIL pictures. Weights are loaded on the first call, once per process and model, onto the device of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerfm import encoders
from steerfm.rewards import Prompts, RewardError
from steerfm_rewards.late import WordsReward


@lru_cache(maxsize=4)
def _open_clip(model: str, pretrained: str | None) -> encoders.OpenClip:
    return encoders.open_clip(model, pretrained)


class ClipReward(WordsReward):
    """Base class of rewards with an open_clip model.

    Args:
        model: as for `steerfm.encoders.open_clip`.
        pretrained: as for `steerfm.encoders.open_clip`.
    """

    def __init__(self, model: str, pretrained: str | None) -> None:
        super().__init__()
        self.model, self.pretrained = str(model), pretrained

    def load(self) -> encoders.OpenClip:
        return _open_clip(self.model, self.pretrained)


class Clip(ClipReward):
    """Similarity of a picture and its prompt: their cosine in an open_clip model, times a temperature.

        temperature (cos(image, prompt) - negative_weight cos(image, negative))

    Unit: cosine times temperature; with temperature=1 and no negative prompt from -1 to 1. Gradient: yes, through the
    preprocessing. Pictures: 1 or 3 channels, any size. (Radford et al. 2103.00020.)

    Args:
        prompt: prompt of all pictures; None for each picture's own prompt.
        negative: prompt to move away from.
        negative_weight: weight of the cosine with ``negative``.
        temperature: factor of the cosines; None for the model's own (100 in OpenAI's).
        model: a shipped name, a folder that open_clip wrote, or an architecture of open_clip such as ViT-B-32.
        pretrained: for an architecture, its tag (downloaded once) or a file of weights.

    >>> steerfm.reward("clip", prompt="a red heart")
    >>> steerfm.reward("clip", model="ViT-B-32", pretrained="laion2b_s34b_b79k")
    """

    name, unit, range = "clip", "cosine x temperature", (-float("inf"), float("inf"))

    def __init__(
        self,
        prompt: str | None = None,
        negative: str | None = None,
        negative_weight: float = 1.0,
        temperature: float | None = 1.0,
        model: str = "emoji-clip",
        pretrained: str | None = None,
    ) -> None:
        super().__init__(model, pretrained)
        self.ask(prompt)
        self.negative, self.negative_weight, self.temperature = negative, float(negative_weight), temperature

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) and, without a prompt of its own, prompts -> (b,)."""
        image = self.image(images)
        cosine = self.likeness(image, prompts)
        if self.negative is not None:
            cosine = cosine - self.negative_weight * (image * self.text([self.negative], image)).sum(1)
        return cosine * (self.network(images.device).scale if self.temperature is None else self.temperature)


class ClipDirection(ClipReward):
    """Change of a picture along the difference of two prompts: cos(image - start image, to - from).

    Unit: cosine, from -1 to 1. Gradient: yes. (StyleGAN-NADA, Gal et al. 2108.00946, equation 2.) Without a start picture, the
    change is measured from the origin: cos(image, to - from).

    Args:
        to: prompt at the end of the direction.
        source: prompt at its start.
        start: picture (c, h, w) in [0, 1] from which the change is measured.
        model: as for `Clip`.
        pretrained: as for `Clip`.

    >>> steerfm.reward("clip_direction", source="a face", to="a smiling face")
    """

    name, unit, range = "clip_direction", "cosine", (-1.0, 1.0)

    def __init__(
        self, to: str, source: str, start: Tensor | None = None, model: str = "emoji-clip", pretrained: str | None = None
    ) -> None:
        super().__init__(model, pretrained)
        if to == source:
            raise RewardError("reward 'clip_direction' got the same text twice: to= and source= must differ")
        self.to_, self.source, self.start = to, source, start

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) -> (b,)."""
        image = self.image(images)
        to, source = self.text([self.to_, self.source], image)
        if self.start is not None:
            with torch.no_grad():
                start = self.image(self.start.to(images).unsqueeze(0))
            image = image - start
        return F.cosine_similarity(image, (to - source).unsqueeze(0), dim=1, eps=1e-6)


class Aesthetic(ClipReward):
    """A head on the embeddings of an open_clip model, such as LAION's aesthetic predictors: one linear layer, or several.

    Unit: the head's own (LAION's: 1 to 10). Gradient: yes.

    Args:
        head: file of weights (.safetensors, .pt or .pth): matrices in the order of their names, each with its bias.
        model: the open_clip model that the head was trained on (LAION's: ViT-L-14).
        pretrained: weights of that model (LAION's: openai).

    >>> steerfm.reward("aesthetic", head="sac+logos+ava1-l14-linearMSE.pth", model="ViT-L-14", pretrained="openai")
    """

    name, unit, range = "aesthetic", "score of the head", (-float("inf"), float("inf"))

    def __init__(self, head: str | Path, model: str = "emoji-clip", pretrained: str | None = None) -> None:
        super().__init__(model, pretrained)
        self.head = _head(Path(head))

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) -> (b,)."""
        image = self.image(images)
        width = self.head[0].in_features
        if image.shape[1] != width:
            raise RewardError(
                f"reward 'aesthetic' has a head for embeddings of {width} numbers, {self.model} makes {image.shape[1]}: "
                "name the model that the head was trained on, model= and pretrained="
            )
        return self.head.to(image)(image).squeeze(1)


def _head(path: Path) -> nn.Sequential:
    if not path.is_file():
        raise RewardError(f"reward 'aesthetic': no file {path}: put the weights of the head there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: dict[str, Any] = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RewardError(f"reward 'aesthetic' cannot read {path}: {type(error).__name__}: {error}") from None
    return linear_layers("aesthetic", weights, path)


def linear_layers(name: str, weights: Any, path: Path) -> nn.Sequential:
    """Build a chain of linear layers from matrices and biases, in the order of their names, without activations between them.

    Args:
        name: name of the reward, for messages.
        weights: tensors by name.
        path: file of the weights, for messages.

    Raises:
        RewardError: the layers do not form a chain that ends in one number.
    """
    try:
        names = sorted(weights, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])
        matrices = [(name, weights[name].float()) for name in names if name.endswith("weight") and weights[name].ndim == 2]
        layers = []
        for key, matrix in matrices:
            bias = weights.get(f"{key.removesuffix('weight')}bias")
            layer = nn.Linear(matrix.shape[1], matrix.shape[0])
            layer.load_state_dict({"weight": matrix, "bias": torch.zeros(len(matrix)) if bias is None else bias.float()})
            layers.append(layer)
        fits = all(a.out_features == b.in_features for a, b in zip(layers, layers[1:]))
    except Exception as error:
        raise RewardError(f"reward {name!r} cannot read {path}: {type(error).__name__}: {error}") from None
    if not layers or not fits or layers[-1].out_features != 1:
        raise RewardError(f"reward {name!r}: {path} is not a chain of linear layers that ends in one number")
    return nn.Sequential(*layers).requires_grad_(False)


class PickScore(WordsReward):
    """A preference model in the layout of transformers' CLIPModel, such as PickScore: scale cos(image, prompt).

    Unit: logits; differences of two pictures are log-odds of the preference. Gradient: yes. (Kirstain et al. 2305.01569.)

    Args:
        folder: folder with config.json, weights and tokenizer, as written by ``save_pretrained``. Nothing is downloaded.
        prompt: prompt of all pictures; None for each picture's own prompt.
        model: another name for ``folder``.

    >>> steerfm.reward("pickscore", folder="models/PickScore_v1")
    """

    name, unit, range = "pickscore", "logits", (-float("inf"), float("inf"))

    def __init__(self, folder: str | Path | None = None, prompt: str | None = None, *, model: str | Path | None = None) -> None:
        super().__init__()
        self.ask(prompt)
        if (folder is None) == (model is None):
            what = "needs a folder" if folder is None else "has two folders"
            raise RewardError(f"reward 'pickscore' {what}: give folder=, a folder with a CLIPModel of transformers")
        self.folder = Path(str(model if folder is None else folder))
        if not (self.folder / "config.json").is_file():
            raise RewardError(
                f"reward 'pickscore': no config.json in {self.folder}: put a folder of transformers' CLIPModel there"
            )

    def load(self) -> nn.Module:
        return _transformers_clip(self.folder)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) -> (b,)."""
        return self.network(images.device).model.logit_scale.exp() * self.likeness(self.image(images), prompts)


class _TransformersClip(nn.Module):
    """A CLIPModel of transformers with the interface of `encoders.OpenClip`; frozen."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        size = model.config.vision_config.image_size
        self.preprocessing = encoders.Preprocessing((size, size), *encoders.OPENAI)
        self.eval().requires_grad_(False)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        device = next(self.parameters()).device
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            return F.normalize(_features(self.model.get_text_features(**tokens)), dim=-1)

    def encode_image(self, pictures: Tensor) -> Tensor:
        pixels = self.preprocessing(pictures).to(next(self.parameters()).dtype)
        return F.normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=-1)


def _features(out: Any) -> Tensor:
    """Return the features as a tensor: transformers 5 returns an output object, transformers 4 the tensor."""
    return out if isinstance(out, Tensor) else out.pooler_output


@lru_cache(maxsize=2)
def _transformers_clip(folder: Path) -> nn.Module:
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError:
        raise ImportError("it needs a package: pip install transformers") from None
    try:
        result: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged folder can fail anywhere
        raise FileNotFoundError(f"cannot load {folder}: {' '.join(str(error).split())[:200]}") from None
    model, info = result
    unfit = [name for kind in ("missing_keys", "mismatched_keys") for name in info.get(kind) or ()]  # left random
    unfit += [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if unfit:
        raise ValueError(f"corrupt model {folder}: {unfit[0]} is missing, of another shape or not finite")
    return _TransformersClip(model, tokenizer)
