"""The ledger: counts the cost of a run.

>>> with Ledger() as ledger:
...     samples = steerfm.sample(flow_map, n=64, steps=4)
>>> ledger.cost.forwards                      # 256: summed over samples, for any batch size
256

`FlowMap` and `Reward` report to the active ledger, so the cost of a user's own look-ahead or method counts as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor


@dataclass
class Cost:
    """The cost of a run. Counts are summed over samples: one call for each of 64 particles is 64 forwards.

    Attributes:
        forwards: network evaluations.
        backwards: backward passes of the network.
        reward_calls: evaluations of the reward.
        reward_backwards: backward passes of the reward.
        decodes: conversions from model space to pictures.
        seconds: wall time.
        peak_bytes: peak memory of the accelerator, or of the process without one.
    """

    forwards: int = 0
    backwards: int = 0
    reward_calls: int = 0
    reward_backwards: int = 0
    decodes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**total | {"peak_bytes": max(self.peak_bytes, other.peak_bytes)})

    def __str__(self) -> str:
        counts = (
            f"{value:,} {name.replace('_', ' ')}" for name, value in self.counts().items() if value
        )  # fmt: skip
        mib = self.peak_bytes / 2**20
        memory = f"{mib:.0f} MiB" if mib < 999.5 else f"{mib / 2**10:.1f} GiB"
        return ", ".join((*counts, f"{self.seconds:.2f} s", memory))

    @property
    def evaluations(self) -> int:
        """Network evaluations, with a backward pass counted as two; methods are compared at equal numbers of these."""
        return self.forwards + 2 * self.backwards

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def counts(self) -> dict[str, int]:
        """The counts, without time and memory."""
        return {name: int(value) for name, value in asdict(self).items() if name not in ("seconds", "peak_bytes")}


_active: ContextVar[Ledger | None] = ContextVar("steerfm_ledger", default=None)


class Ledger:
    """Context manager that collects the `Cost` of all work inside it. Ledgers nest; the outer one counts everything."""

    def __init__(self) -> None:
        self.cost = Cost()
        self._parent: Ledger | None = None
        self._token: Token[Ledger | None] | None = None

    def __enter__(self) -> Ledger:
        self._parent = _active.get()
        self._token = _active.set(self)
        self._started = time.perf_counter()
        if self._parent is not None:  # keep the outer ledger's peak before the reset below
            self._parent.cost.peak_bytes = max(self._parent.cost.peak_bytes, _peak_bytes())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost.seconds += time.perf_counter() - self._started
        self.cost.peak_bytes = max(self.cost.peak_bytes, _peak_bytes())
        if self._parent is not None:
            self._parent.cost.peak_bytes = max(self._parent.cost.peak_bytes, self.cost.peak_bytes)
        if self._token is not None:
            _active.reset(self._token)

    def add(self, name: str, amount: int) -> None:
        setattr(self.cost, name, getattr(self.cost, name) + amount)
        if self._parent is not None:
            self._parent.add(name, amount)


def current() -> Ledger | None:
    """The active ledger, or None."""
    return _active.get()


@contextmanager
def aside(ledger: Ledger) -> Iterator[None]:
    """A context whose costs are counted in this ledger only."""
    token = _active.set(ledger)
    try:
        yield
    finally:
        _active.reset(token)


def count(name: str, amount: int) -> None:
    """Add ``amount`` to the field ``name`` of the active ledger, if there is one."""
    ledger = _active.get()
    if ledger is not None:
        ledger.add(name, amount)


def count_backward(name: str, amount: int, output: Tensor) -> None:
    """Count ``amount`` when a backward pass reaches ``output``; no cost without a graph.

    The ledger is looked up at once, since on an accelerator the backward pass runs in another thread.
    """
    ledger = _active.get()
    if ledger is not None and output.requires_grad:
        output.register_hook(lambda _: ledger.add(name, amount))


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
