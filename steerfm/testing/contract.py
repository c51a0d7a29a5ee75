"""What the checks share: one kind of failure, and ways to see that code depends on nothing but its arguments."""

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
    """A broken contract; the message is one sentence that says what is wrong and how to mend it."""


def require(holds: Any, wrong: str, mend: str) -> None:
    """Raise a ContractError unless it holds.

    Args:
        holds: the condition.
        wrong: what is wrong.
        mend: how to mend it.
    """
    if not bool(holds):
        raise ContractError(f"{wrong}: {mend}")


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Any exception in here breaks the contract; a message of steerfm's own says the fix itself."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ContractError(text if text.startswith(what) else f"{what} fails with {type(error).__name__}: {text}") from error


def pictures(n: int, shape: tuple[int, ...], seed: int = 0, bounded: bool | None = None) -> Tensor:
    """Uniform noise in [0.05, 0.95], (n, *shape): a small step in any direction is still a picture. What is not bounded (by
    default vectors) is normal."""
    generator = stream(seed, "contract")
    if len(shape) == 3 if bounded is None else bounded:
        return 0.05 + 0.9 * torch.rand(n, *shape, generator=generator, dtype=torch.float32)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float32)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors are of one shape and equal up to rounding."""
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance / 10))


def furthest(a: Tensor, b: Tensor) -> int:
    """The row in which two tensors differ most."""
    return int((a - b).detach().abs().flatten(1 if a.ndim > 1 else 0).reshape(len(a), -1).amax(1).argmax())


def after_seed(seed: int, call: Callable[[], Any]) -> Any:
    """What a call gives after torch's, numpy's and Python's global generators were seeded; their states are as before."""
    with untouched():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return call()


def moves_global_state(call: Callable[[], Any]) -> bool:
    """Whether a call changes the state of a global generator: by drawing from it, or by seeding it."""

    def run() -> bool:
        before = _states()
        call()
        return _states() != before

    return after_seed(0x0DD5EED, run)  # which nobody seeds with


def _states() -> tuple[bytes, str, str]:
    return torch.get_rng_state().numpy().tobytes(), str(random.getstate()), pickle.dumps(np.random.get_state()).hex()
