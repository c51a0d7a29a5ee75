"""Peak memory of a transformer with 100 M random parameters, steered with gradients and tuned for one update, with and without
activation checkpoints: each in a process of its own, on the CPU.

python benchmarks/memory_large.py                     # fails if a peak with checkpoints is above the limit
python benchmarks/memory_large.py --blocks 2 --tokens 64 --width 64
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steerfm
from steerfm.blocks import checkpoint_activations

LIMIT = 1536
"""Limit in MiB. The weights take 380; Python with its libraries takes 550 for steering and 880 for tuning."""


class Block(nn.Module):
    """Attention and an MLP, conditioned on the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x) + time).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class Transformer(nn.Module):
    """A velocity of latents (b, 4, h, w), with one token per 2 x 2 patch."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.inputs, self.time, self.outputs = nn.Linear(16, width), nn.Linear(1, width), nn.Linear(width, 16)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.inputs(F.unfold(x, 2, stride=2).transpose(1, 2))
        time = self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            h = block(h, time)
        return F.fold(self.outputs(h).transpose(1, 2), x.shape[2:], 2, stride=2)


def mean(latents: Tensor) -> Tensor:
    """A reward of latents."""
    return latents.flatten(1).mean(1)


mean.space = "model"  # type: ignore[attr-defined]


def steer(flow_map: steerfm.FlowMap) -> None:
    steerfm.steer(flow_map, mean, steerfm.method("dps", steps=2), n=1, seeds=0, strength=1.0)


def tune(flow_map: steerfm.FlowMap) -> None:
    from steerfm.finetuning import DRaFTK, FineTuning, LoRA
    from steerfm.training import fit

    with tempfile.TemporaryDirectory() as folder:
        reward = steerfm.reward(mean)
        module = FineTuning(flow_map, reward, DRaFTK(jumps=2), batch_size=1, scale=1.0, steps=1, lora=LoRA(rank=4))
        fit(module, module.data(), Path(folder), accelerator="cpu", validate_every=0, save_every=0, progress=False)


def work(what: str, checkpoints: bool, width: int, blocks: int, tokens: int) -> None:
    """Do one measurement in this process, and print its peak in MiB, its seconds, and the number of parameters."""
    torch.manual_seed(0)
    side = 2 * round(tokens**0.5)
    network = Transformer(width, blocks)
    if checkpoints:
        checkpoint_activations(network)
    flow_map = steerfm.VelocityModel(network, (4, side, side)).eval().requires_grad_(False)
    begin = time.perf_counter()
    {"steered": steer, "tuned": tune}[what](flow_map)
    seconds = time.perf_counter() - begin
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds, sum(p.numel() for p in network.parameters()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest peak with activation checkpoints, in MiB")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work[0], options.work[1] == "with", options.width, options.blocks, options.tokens)
        return 0
    size, high = ["--width", str(options.width), "--blocks", str(options.blocks), "--tokens", str(options.tokens)], False
    for what in ("steered", "tuned"):
        for how in ("without", "with"):
            process = subprocess.run(
                [sys.executable, __file__, *size, "--work", what, how], capture_output=True, text=True, check=True,
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},  # return freed memory to the system at once
            )  # fmt: skip
            peak, seconds, parameters = map(float, process.stdout.split()[-3:])
            late = how == "with" and peak > options.limit
            high |= late
            note = f", above the limit of {options.limit:g}" if late else ""
            print(
                f"{parameters / 1e6:.3g} M parameters, {options.tokens} tokens, {what}, {how} activation checkpoints: "
                f"{peak:,.0f} MiB, {seconds:.1f} s{note}",
                flush=True,
            )
    return int(high)


if __name__ == "__main__":
    sys.exit(main())
