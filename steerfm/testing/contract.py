"""Common parts of the checks: the error, and tests that code depends only on its arguments."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfm.randomness import stream, untouched


class ContractError(AssertionError):
    """A broken contract; the message is one sentence with the violation and its fix."""


def require(holds: Any, wrong: str, mend: str) -> None:
    """Raise a ContractError unless a condition holds.

    Args:
        holds: the condition.
        wrong: the violation.
        mend: the fix.
    """
    if not bool(holds):
        raise ContractError(f"{wrong}: {mend}")


@contextmanager
def failing(what: str) -> Iterator[None]:
    """A context in which any exception breaks the contract; messages of steerfm already contain the fix."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ContractError(text if text.startswith(what) else f"{what} fails with {type(error).__name__}: {text}") from error


def pictures(n: int, shape: tuple[int, ...], seed: int = 0, bounded: bool | None = None) -> Tensor:
    """Random inputs (n, *shape): uniform in [0.05, 0.95] if bounded, so that small steps stay in [0, 1]; else normal. By
    default pictures are bounded, and vectors are not."""
    generator = stream(seed, "contract")
    if len(shape) == 3 if bounded is None else bounded:
        return 0.05 + 0.9 * torch.rand(n, *shape, generator=generator, dtype=torch.float32)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float32)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors have equal shapes and equal values up to rounding."""
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance / 10))


def furthest(a: Tensor, b: Tensor) -> int:
    """The row with the largest difference."""
    return int((a - b).detach().abs().flatten(1 if a.ndim > 1 else 0).reshape(len(a), -1).amax(1).argmax())


def after_seed(seed: int, call: Callable[[], Any]) -> Any:
    """The result of a call after seeding the global generators of torch, numpy and Python; their states are restored."""
    with untouched():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return call()


def moves_global_state(call: Callable[[], Any]) -> bool:
    """Whether a call draws from a global generator or seeds it."""

    def run() -> bool:
        before = _states()
        call()
        return _states() != before

    return after_seed(0x0DD5EED, run)  # an unusual seed


def _states() -> tuple[bytes, str, str]:
    return torch.get_rng_state().numpy().tobytes(), str(random.getstate()), pickle.dumps(np.random.get_state()).hex()
