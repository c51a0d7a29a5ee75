"""Activations that are computed again: the same gradients, less kept for them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import steerfm
from steerfm.blocks import blocks, checkpoint_activations
from steerfm.cli import main
from steerfm.networks import ResNet


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.wide = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        h = self.norm(x) + shift
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.wide[1](nn.functional.gelu(self.wide[0](h)))


class Transformer(nn.Module):
    """Velocities of pictures of one channel, a token a row of pixels."""

    def __init__(self, side: int = 16, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.inputs, self.time, self.outputs = nn.Linear(side, width), nn.Linear(1, width), nn.Linear(width, side)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        h, shift = self.inputs(x.squeeze(1)), self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            h = block(h, shift=shift)
        return self.outputs(h).unsqueeze(1)


@pytest.fixture
def network() -> Transformer:
    torch.manual_seed(0)
    return Transformer()


def kept(network: nn.Module, x: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes that are kept for the gradients of a call, and these."""
    seen = {}

    def note(value: Tensor) -> Tensor:
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        out = network(x, torch.full((len(x),), 0.3)).square().mean()
    return sum(size for place, size in seen.items() if place not in own), list(
        torch.autograd.grad(out, [x, *network.parameters()])
    )


def test_gradients_are_the_same_and_a_third_is_kept(network: Transformer):
    thrifty, x = copy.deepcopy(network), torch.randn(4, 1, 16, 16, requires_grad=True)
    checkpoint_activations(thrifty)
    (much, want), (little, got) = kept(network, x), kept(copy.deepcopy(thrifty), x)
    assert little < much / 3
    assert all(torch.equal(one, two) for one, two in zip(want, got))
    assert thrifty.state_dict().keys() == network.state_dict().keys()
    assert type(thrifty.blocks[0]).__name__ == "Block" and isinstance(thrifty.blocks[0], Block)


def test_derivatives_forwards_are_those_without(network: Transformer):
    thrifty, x, t = copy.deepcopy(network), torch.randn(2, 1, 16, 16), torch.full((2,), 0.3)
    checkpoint_activations(thrifty)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want, got = (torch.func.jvp(lambda t, n=n: n(x, t), (t,), (torch.ones_like(t),)) for n in (network, thrifty))
    assert all(torch.equal(one, two) for one, two in zip(want, got))


def test_blocks_are_lists_of_one_class_and_not_their_parts(network: Transformer):
    assert blocks(network) == list(network.blocks)
    with pytest.raises(ValueError, match="ResNet has no blocks"):
        checkpoint_activations(ResNet())


MAP = """
import torch, steerfm
from test_blocks import Transformer

def blocks():
    torch.manual_seed(0)
    return steerfm.VelocityModel(Transformer(), (1, 16, 16)).eval()

def sequence():
    return steerfm.VelocityModel(lambda x, t, cond: -x, (1, 16, 16))
"""


@pytest.mark.slow
def test_a_command_saves_memory_and_its_folder_does_not_depend_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "maps.py").write_text(MAP)
    monkeypatch.chdir(tmp_path)
    keys = [
        "steer",
        "model=maps.py:blocks",
        "reward=brightness",
        "method=dps",
        "method.steps=2",
        "n=1",
        "strength=1",
        "device=cpu",
    ]
    assert main([*keys, "out=run", "activation_checkpoints=true"]) == 0
    assert main([*keys, "out=run"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main([*keys, "model=maps.py:sequence", "out=no", "activation_checkpoints=true"]) == 2
    assert "activation_checkpoints=true: VelocityModel has no blocks" in capsys.readouterr().err


def test_steering_gives_the_same_samples(network: Transformer):
    runs = []
    for again in (False, True):
        if again:
            checkpoint_activations(network)
        flow_map = steerfm.VelocityModel(network, (1, 16, 16)).eval()
        runs.append(steerfm.steer(flow_map, "brightness", "dps", n=1, seeds=0, strength=1.0).samples)
    assert torch.equal(*runs)
