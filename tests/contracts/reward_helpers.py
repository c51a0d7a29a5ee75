"""What some rewards need before they can be tried: a head, a preference model, a server. Tiny, with random weights."""

from __future__ import annotations

import runpy
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file

import steerfm

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@lru_cache(maxsize=1)
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="steerfm-"))


@lru_cache(maxsize=1)
def head_file() -> Path:
    """A head of two linear layers on the embeddings of emoji-clip."""
    generator, file = torch.Generator().manual_seed(0), _folder() / "head.safetensors"
    weights = {"layers.0.weight": (8, 256), "layers.0.bias": (8,), "layers.2.weight": (1, 8), "layers.2.bias": (1,)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in weights.items()}, file)
    return file


@lru_cache(maxsize=1)
def clip_folder() -> Path:
    """A transformers CLIPModel of 32 x 32 pictures, with a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<end>", "red", "heart", "picture", *map(str, range(10))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(words),
        "max_position_embeddings": 8,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 2,
    }
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    folder = _folder() / "clip"
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


@lru_cache(maxsize=4)
def server_of(name: str) -> str:
    """The address of the example's server of a reward, on a thread of this process."""
    server = runpy.run_path(str(EXAMPLES / "reward_server.py"))["serve"](steerfm.reward(name), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
