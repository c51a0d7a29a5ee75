"""Streams of random numbers from seeds: every draw of the library starts here.

    stream(seed, "selection")                    # a torch.Generator on the CPU
    derive(seed, "training", step, row)          # a new seed

A stream belongs to (seed, purpose, step, row). Streams of different keys are unrelated and do not depend on earlier draws. So a
resumed run draws the same numbers as an uninterrupted one, and a row the same numbers for any number of processes.

torch's CPU generator keeps the low 32 bits of a seed, so that seeds 2**32 apart draw the same numbers. Here the key is hashed
into the whole state of the generator, 19,968 bits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

PATH = "path"
_DERIVED = 2**127  # above every seed of 64 bits


def stream(seed: int, purpose: str = PATH, step: int = 0, row: int = 0) -> torch.Generator:
    """A CPU generator for one purpose.

    For seeds of 32 bits, the stream of the path is torch's own, ``torch.Generator().manual_seed(seed)``, so that other
    libraries draw the same sample from the same seed.

    Args:
        seed: any integer.
        purpose: use of the numbers; "path" is the noise of a sample.
        step: update, round or epoch.
        row: row of a batch, or rank of a process.
    """
    generator = torch.Generator()
    if (purpose, step, row) == (PATH, 0, 0) and 0 <= seed < 2**32:
        return generator.manual_seed(seed)
    words = np.frombuffer(_digest(seed, purpose, step, row, 4 * 624), "<u4").astype("<u8")
    state = _blank_state().clone()
    state[24 : 24 + 8 * 624] = torch.from_numpy(words.view(np.uint8))
    return generator.set_state(state)


def derive(seed: int, purpose: str, step: int = 0, row: int = 0) -> int:
    """A seed for (seed, purpose, step, row), of 128 bits; seeds of users have at most 64.

    Training uses derived seeds and evaluation uses seeds of users, so the two cannot coincide.
    """
    return _DERIVED | int.from_bytes(_digest(seed, purpose, step, row, 16), "little")


def is_derived(seed: int) -> bool:
    """Whether a seed comes from `derive`."""
    return seed >= _DERIVED


@contextmanager
def global_stream(seed: int, purpose: str, step: int = 0, row: int = 0) -> Iterator[None]:
    """A context in which torch's global generators (for initial weights and dropout) draw from this key; then restored."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        if torch.accelerator.is_available():  # skip this on a CPU: it takes a millisecond
            torch.manual_seed(int.from_bytes(_digest(seed, purpose, step, row, 7), "little"))  # of every device
        torch.set_rng_state(stream(seed, purpose, step, row).get_state())
        yield


def _digest(seed: int, purpose: str, step: int, row: int, size: int) -> bytes:
    return hashlib.shake_128(f"{int(seed)}\0{purpose}\0{int(step)}\0{int(row)}".encode()).digest(size)


@cache
def _blank_state() -> Tensor:
    """A generator's state before its first number: seed (8 bytes), position (16), 624 words of 8 bytes, unused normals."""
    return torch.Generator().manual_seed(0).get_state()


@contextmanager
def untouched() -> Iterator[None]:
    """A context for user code. Changes to the global random states (torch, numpy, random), to torch's default dtype and device,
    and to the grad mode are undone at the end."""
    dtype, device, grad = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_grad_enabled(grad)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
