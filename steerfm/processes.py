"""Several processes on one run: who they are, what one says to all, and calls whose rows they share.

Every process runs the same program and has all states. Of a call, each makes some parts, and all get all of its rows: the same
bits everywhere. A part is never cut, so what is computed does not depend on the number of processes. `steerfm.distributed`
starts them; without it nothing here does anything.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steerfm.cost import Ledger, aside, current
from steerfm.scores import counted_from

HEAD = 2040
"""Bytes that every message has room for; a longer one costs a second exchange."""
Value = TypeVar("Value")
Part = Callable[..., tuple[Tensor, Any]]
"""What makes some rows: called with a slice of all rows and with the inputs' rows, it returns rows (b, ...) and a note, the
same for all parts."""


class Lost(BaseException):
    """Another process is gone, so this one cannot go on. No `Exception`: nobody is to take it for a fault of a model."""


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: number of this one.
        size: how many there are.
        words: the torch group in which they talk about what is on the CPU; None for the default one.
    """

    rank: int
    size: int
    words: Any = None

    def exchange(self, told: Any) -> list[Any]:
        """What every process tells, in the order of their ranks."""
        said = pickle.dumps(told)
        heads = self._all(_bytes(len(said).to_bytes(8, "little") + said[:HEAD], HEAD + 8))
        sizes = [int.from_bytes(head[:8].numpy().tobytes(), "little") for head in heads]
        texts = [head[8:] for head in heads]
        if max(sizes) > HEAD:
            texts = self._all(_bytes(said, max(sizes)))
        return [pickle.loads(text[:size].numpy().tobytes()) for text, size in zip(texts, sizes)]

    def gather(self, mine: Tensor | None, rows: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
        """Rows (n, *shape) of all processes, one after the other: ``rows`` of them from each, to the bit.

        Args:
            mine: those of this process, contiguous; None where it has none.
            like: what the rows have in common with another
                tensor: type and device.
        """
        width = like.element_size() * torch.Size(shape).numel()
        room = torch.zeros(max(rows), width, dtype=torch.uint8, device=like.device)
        if mine is not None:
            room[: len(mine)] = mine.detach().reshape(len(mine), -1).view(torch.uint8)
        parts = self._all(room)
        every = torch.cat([part[:count] for part, count in zip(parts, rows)])
        return every.view(like.dtype).reshape(len(every), *shape)

    def _all(self, mine: Tensor) -> list[Tensor]:
        """The tensor (bytes, of one shape everywhere) of every process."""
        out = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(out, mine, group=self.words if mine.device.type == "cpu" else None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Lost(f"process {self.rank} of {self.size} lost another one: {str(error).splitlines()[0]}") from error
        return out


_active: ContextVar[Group | None] = ContextVar("steerfm_processes", default=None)


def active() -> Group | None:
    """The processes that share calls here; None where this one makes them alone."""
    return _active.get()


def join(group: Group | None) -> None:
    """Share calls with these processes from now on; None for no longer."""
    _active.set(group)


@contextmanager
def together(group: Group | None) -> Iterator[None]:
    """Inside, calls are shared with these processes; None for with nobody."""
    token = _active.set(group)
    try:
        yield
    finally:
        _active.reset(token)


def alone() -> AbstractContextManager[None]:
    """Inside, this process makes whole calls by itself: for what only one of them does, and where a gradient is to be
    differentiated again."""
    return together(None)


def first() -> bool:
    """Whether this is the process that writes files and prints: the first, or the only one."""
    group = active()
    return group is None or group.rank == 0


def of_first(call: Callable[[], Value]) -> Value:
    """What a call returns in the first process, which alone makes it; its error is an error in all of them."""
    group = active()
    if group is None:
        return call()
    value, error = None, None
    if group.rank == 0:
        try:
            with alone():
                value = call()
        except Exception as raised:
            error = raised
    value, told = group.exchange((value, _sendable(error)) if group.rank == 0 else None)[0]
    if told is not None:
        raise error or told
    return value


def tell(value: Any, error: Exception | None = None) -> list[Any]:
    """What every process tells, in the order of their ranks; an error that one of them tells is raised in all, once."""
    group = active()
    if error is not None and (group is None or getattr(error, "told", False)):
        raise error
    if group is None:
        return [value]
    said = group.exchange((value if error is None else None, _sendable(error)))
    for rank, (_, other) in enumerate(said):
        if other is not None:
            failure: Any = error if rank == group.rank and error is not None else other
            failure.told = True  # whoever catches it and tells it is not waited for by the others
            raise failure
    return [value for value, _ in said]


def sharded(module: nn.Module) -> bool:
    """Whether several processes hold the weights of a module together, so that all of them must make all of its calls."""
    if active() is None and not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def share(
    what: str,
    parts: Sequence[slice],
    call: Part,
    inputs: Sequence[Tensor],
    by_first: bool = False,
    in_step: bool = False,
) -> tuple[Tensor, Any]:
    """Rows that several processes make together, and the note of those that made some.

    Args:
        what: the name of the call, which all processes must make in the same order.
        parts: slices that cover all rows in order; part i is made by process i size // len(parts).
        call: makes a part.
        inputs: (b, ...) each; gradients reach them where the rows that come out have one.
        by_first: the first process makes all parts.
        in_step: all processes make as many calls; one that has no part left makes the first one again, for nothing.

    Raises:
        RuntimeError: the processes are not at the same call. Whatever the call raises, in the first process where it does, and
            in all of them.
    """
    group = active()
    assert group is not None
    owners = [0 if by_first else number * group.size // len(parts) for number in range(len(parts))]
    job = _Shared(group, f"{what} of {parts[-1].stop} rows", parts, owners, call, in_step)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        rows: Any = _Rows.apply(job, *inputs)
        return rows, job.note
    return job.forward(inputs, [False] * len(inputs)), job.note


class _Shared:
    """One call: its parts, and of those that this process makes the graphs."""

    def __init__(
        self, group: Group, what: str, parts: Sequence[slice], owners: Sequence[int], call: Part, in_step: bool
    ) -> None:
        self.group, self.what, self.call = group, what, call
        most = max(owners.count(rank) for rank in range(group.size)) if in_step else 0
        self.idle = [parts[0]] * (most - owners.count(group.rank))
        self.mine = [part for part, owner in zip(parts, owners) if owner == group.rank]
        self.rows = [sum(p.stop - p.start for p, owner in zip(parts, owners) if owner == rank) for rank in range(group.size)]
        self.outer, self.inner = current(), Ledger()
        self.graphs: list[tuple[list[Tensor], Tensor]] = []
        self.idle_graphs: list[tuple[list[Tensor], Tensor]] = []
        self.note, self.differentiable = None, False

    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Tensor:
        """All rows; ``wanted`` says of each of the inputs whether its gradient will be."""
        outs: list[Tensor] = []

        def make() -> None:
            with torch.set_grad_enabled(any(wanted)):
                for part in self.mine:
                    given = [x[part].detach().requires_grad_(want) for x, want in zip(inputs, wanted)]
                    with counted_from(part.start):
                        out, self.note = self.call(part, *given)
                    outs.append(out)
                    self.differentiable |= out.requires_grad
                    if out.requires_grad:
                        self.graphs.append((given, out))
                for part in self.idle:
                    given = [x[part].detach().requires_grad_(want) for x, want in zip(inputs, wanted)]
                    with aside(Ledger()):
                        out, _ = self.call(part, *given)
                    if out.requires_grad:
                        self.idle_graphs.append((given, out))

        told = self._settle(make, lambda: (self.note, self.differentiable, _Form.of(outs)))
        self.note, self.differentiable, form = next(said for said in told if said[2] is not None)
        assert form is not None
        return form.joined(self.group, outs, self.rows, inputs[0].device)

    def backward(self, gradient: Tensor, wanted: Sequence[bool], devices: Sequence[torch.device]) -> list[Tensor | None]:
        """The gradient of each of the inputs that has one, of all rows."""
        grads: list[list[Tensor]] = [[] for _ in wanted]
        begin = sum(self.rows[: self.group.rank])

        def make() -> None:
            row = begin
            for given, out in self.graphs:
                seen = [x for x in given if x.requires_grad]
                own = iter(torch.autograd.grad(out, seen, gradient[row : row + len(out)], allow_unused=True))
                row += len(out)
                for place, x in zip(grads, given):
                    if x.requires_grad:
                        grad = next(own)
                        place.append(torch.zeros_like(x) if grad is None else grad)
            for given, out in self.idle_graphs:
                torch.autograd.grad(out, [x for x in given if x.requires_grad], torch.zeros_like(out), allow_unused=True)

        forms = self._settle(make, lambda: [_Form.of(place) for place in grads])
        self.graphs.clear()
        self.idle_graphs.clear()
        out: list[Tensor | None] = []
        for number, (want, device) in enumerate(zip(wanted, devices)):
            form = next((form[number] for form in forms if form[number] is not None), None)
            out.append(form.joined(self.group, grads[number], self.rows, device) if want and form else None)
        return out

    def _settle(self, make: Callable[[], None], told: Callable[[], Any]) -> list[Any]:
        """Make the parts of this process; what every process tells, once all made theirs. Costs are added up."""
        error, before = None, self.inner.cost.counts()
        try:
            with aside(self.inner), alone():
                make()
        except Exception as raised:
            error = raised
        counts = {name: value - before[name] for name, value in self.inner.cost.counts().items()}
        said = self.group.exchange((self.what, _sendable(error), counts, None if error is not None else told()))
        places = {what for what, *_ in said}
        if len(places) > 1:
            where = ", ".join(f"{what} (process {rank})" for rank, (what, *_) in enumerate(said))
            raise RuntimeError(f"the processes are not at the same call: {where}; all of them must make every call")
        if self.outer is not None:
            for name in counts:
                self.outer.add(name, sum(count[name] for _, _, count, _ in said))
        for rank, (_, other, *_) in enumerate(said):
            if other is not None:
                raise (error if rank == self.group.rank and error is not None else other)
        return [out for *_, out in said]


class _Rows(torch.autograd.Function):
    """The rows of a shared call; its backward pass is shared as well."""

    @staticmethod
    def forward(ctx: Any, job: _Shared, *inputs: Tensor) -> Tensor:
        ctx.job, ctx.wanted = job, ctx.needs_input_grad[1:]
        ctx.devices = [x.device for x in inputs]
        out = job.forward(inputs, ctx.wanted)
        if not job.differentiable:
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a shared call has no second derivative: make it under steerfm.distributed.alone()")
        return None, *ctx.job.backward(gradients[0], ctx.wanted, ctx.devices)


@dataclass(frozen=True)
class _Form:
    """How rows lie in memory: what sums over them round to depends on it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> _Form | None:
        if not parts:
            return None
        x = parts[0]
        order = tuple(sorted(range(x.ndim), key=lambda axis: (axis > 0, -x.stride(axis), axis)))
        return cls(x.dtype, tuple(x.shape[1:]), tuple(range(x.ndim)) if x.is_contiguous() else order)

    def joined(self, group: Group, parts: Sequence[Tensor], rows: Sequence[int], device: torch.device) -> Tensor:
        """All rows, as they lie in the parts."""
        mine = torch.cat([part.permute(self.order) for part in parts]).contiguous() if parts else None
        sizes = [self.shape[axis - 1] for axis in self.order[1:]]
        out = group.gather(mine, rows, sizes, torch.empty(0, dtype=self.dtype, device=device))
        return out.permute([self.order.index(axis) for axis in range(len(self.order))])


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one that says the same where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _bytes(text: bytes, size: int) -> Tensor:
    """A text as (size,) bytes, with zeros after it."""
    return torch.frombuffer(bytearray(text.ljust(size, b"\0")), dtype=torch.uint8)
