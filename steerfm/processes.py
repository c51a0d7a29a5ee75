"""Several processes in one run: the group, its messages, and calls with shared rows.

Every process runs the same program and has all states. Each process computes some parts of a call, and all processes get all
rows, with the same bits. Parts are never divided further, so results do not depend on the number of processes.
`steerfm.distributed` starts the processes; without it this module has no effect.
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
"""Bytes of a message in the first exchange; longer messages need a second one."""
Value = TypeVar("Value")
Part = Callable[..., tuple[Tensor, Any]]
"""A function of a slice and of those rows of the inputs; it returns rows (b, ...) and a note, the same for all parts."""


class Lost(BaseException):
    """Another process has ended, so this one cannot continue. Not an `Exception`: no handler of a model may catch it."""


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        words: torch group for data on the CPU; None for the default group.
    """

    rank: int
    size: int
    words: Any = None

    def exchange(self, value: Any) -> list[Any]:
        """Send a value to all processes; returns the values of all, in the order of their ranks."""
        data = pickle.dumps(value)
        heads = self._all(_bytes(len(data).to_bytes(8, "little") + data[:HEAD], HEAD + 8))
        sizes = [int.from_bytes(head[:8].numpy().tobytes(), "little") for head in heads]
        texts = [head[8:] for head in heads]
        if max(sizes) > HEAD:
            texts = self._all(_bytes(data, max(sizes)))
        return [pickle.loads(text[:size].numpy().tobytes()) for text, size in zip(texts, sizes)]

    def gather(self, mine: Tensor | None, rows: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
        """Rows (n, *shape) of all processes, one after the other: ``rows`` of them from each, to the bit.

        Args:
            mine: rows of this process, contiguous; None if it has none.
            rows: number of rows of each process.
            shape: of a row.
            like: a tensor with the dtype and device of the rows.
        """
        width = like.element_size() * torch.Size(shape).numel()
        room = torch.zeros(max(rows), width, dtype=torch.uint8, device=like.device)
        if mine is not None:
            room[: len(mine)] = mine.detach().reshape(len(mine), -1).view(torch.uint8)
        parts = self._all(room)
        every = torch.cat([part[:count] for part, count in zip(parts, rows)])
        return every.view(like.dtype).reshape(len(every), *shape)

    def _all(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all processes: bytes, of equal shapes."""
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
    """The processes that share calls; None if this process works alone."""
    return _active.get()


def join(group: Group | None) -> None:
    """Share calls with these processes from now on; None to stop."""
    _active.set(group)


@contextmanager
def together(group: Group | None) -> Iterator[None]:
    """A context that shares calls with these processes; None for no sharing."""
    token = _active.set(group)
    try:
        yield
    finally:
        _active.reset(token)


def alone() -> AbstractContextManager[None]:
    """A context in which this process makes whole calls alone: for work of a single process, and for second derivatives."""
    return together(None)


def first() -> bool:
    """Whether this is the process that writes files and prints: the first, or the only one."""
    group = active()
    return group is None or group.rank == 0


def of_first(call: Callable[[], Value]) -> Value:
    """Make a call in the first process only, and return its result in all; an error is raised in all as well."""
    group = active()
    if group is None:
        return call()
    value, error = None, None
    if group.rank == 0:
        try:
            with alone():
                value = call()
        except Exception as failure:
            error = failure
    value, shared_error = group.exchange((value, _sendable(error)) if group.rank == 0 else None)[0]
    if shared_error is not None:
        raise error or shared_error
    return value


def tell(value: Any, error: Exception | None = None) -> list[Any]:
    """Exchange values, in the order of the ranks; an error of one process is raised in all of them, once."""
    group = active()
    if error is not None and (group is None or getattr(error, "told", False)):
        raise error
    if group is None:
        return [value]
    messages = group.exchange((value if error is None else None, _sendable(error)))
    for rank, (_, other) in enumerate(messages):
        if other is not None:
            failure: Any = error if rank == group.rank and error is not None else other
            failure.told = True  # the others do not wait for it to be shared again
            raise failure
    return [value for value, _ in messages]


def sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are sharded over processes, so that all of them must make all of its calls."""
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
    """Compute rows in several processes together. Returns all rows and the note of the parts.

    Args:
        what: name of the call; all processes must make the same calls in the same order.
        parts: slices that cover all rows in order; process i size // len(parts) computes part i.
        call: computes a part.
        inputs: (b, ...) each; gradients reach them if the output rows have one.
        by_first: the first process computes all parts.
        in_step: all processes make the same number of calls; a process without a part repeats the first one, without effect.

    Raises:
        RuntimeError: the processes are not at the same call.
        Exception: the call fails in a process; the first such error is raised in all.
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
    """One call: its parts, and the graphs of this process's parts."""

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

    def forward(self, inputs: Sequence[Tensor], needs_grad: Sequence[bool]) -> Tensor:
        """All rows.

        Args:
            inputs: (b, ...) each.
            needs_grad: whether each input needs a gradient.
        """
        outs: list[Tensor] = []

        def make() -> None:
            with torch.set_grad_enabled(any(needs_grad)):
                for part in self.mine:
                    rows_in = [x[part].detach().requires_grad_(need) for x, need in zip(inputs, needs_grad)]
                    with counted_from(part.start):
                        out, self.note = self.call(part, *rows_in)
                    outs.append(out)
                    self.differentiable |= out.requires_grad
                    if out.requires_grad:
                        self.graphs.append((rows_in, out))
                for part in self.idle:
                    rows_in = [x[part].detach().requires_grad_(need) for x, need in zip(inputs, needs_grad)]
                    with aside(Ledger()):
                        out, _ = self.call(part, *rows_in)
                    if out.requires_grad:
                        self.idle_graphs.append((rows_in, out))

        messages = self._settle(make, lambda: (self.note, self.differentiable, _Form.of(outs)))
        self.note, self.differentiable, form = next(message for message in messages if message[2] is not None)
        assert form is not None
        return form.join_rows(self.group, outs, self.rows, inputs[0].device)

    def backward(self, gradient: Tensor, needs_grad: Sequence[bool], devices: Sequence[torch.device]) -> list[Tensor | None]:
        """The gradients of the inputs, of all rows; None for inputs without one."""
        grads: list[list[Tensor]] = [[] for _ in needs_grad]
        begin = sum(self.rows[: self.group.rank])

        def make() -> None:
            row = begin
            for inputs, out in self.graphs:
                sources = [x for x in inputs if x.requires_grad]
                own = iter(torch.autograd.grad(out, sources, gradient[row : row + len(out)], allow_unused=True))
                row += len(out)
                for place, x in zip(grads, inputs):
                    if x.requires_grad:
                        grad = next(own)
                        place.append(torch.zeros_like(x) if grad is None else grad)
            for inputs, out in self.idle_graphs:
                torch.autograd.grad(out, [x for x in inputs if x.requires_grad], torch.zeros_like(out), allow_unused=True)

        forms = self._settle(make, lambda: [_Form.of(place) for place in grads])
        self.graphs.clear()
        self.idle_graphs.clear()
        out: list[Tensor | None] = []
        for number, (need, device) in enumerate(zip(needs_grad, devices)):
            form = next((form[number] for form in forms if form[number] is not None), None)
            out.append(form.join_rows(self.group, grads[number], self.rows, device) if need and form else None)
        return out

    def _settle(self, make: Callable[[], None], report: Callable[[], Any]) -> list[Any]:
        """Compute the parts of this process, then exchange reports with all processes and add up the costs."""
        error, before = None, self.inner.cost.counts()
        try:
            with aside(self.inner), alone():
                make()
        except Exception as failure:
            error = failure
        counts = {name: value - before[name] for name, value in self.inner.cost.counts().items()}
        messages = self.group.exchange((self.what, _sendable(error), counts, None if error is not None else report()))
        places = {what for what, *_ in messages}
        if len(places) > 1:
            where = ", ".join(f"{what} (process {rank})" for rank, (what, *_) in enumerate(messages))
            raise RuntimeError(f"the processes are not at the same call: {where}; all processes must make every call")
        if self.outer is not None:
            for name in counts:
                self.outer.add(name, sum(count[name] for _, _, count, _ in messages))
        for rank, (_, other, *_) in enumerate(messages):
            if other is not None:
                raise (error if rank == self.group.rank and error is not None else other)
        return [out for *_, out in messages]


class _Rows(torch.autograd.Function):
    """The rows of a shared call; its backward pass is shared as well."""

    @staticmethod
    def forward(ctx: Any, job: _Shared, *inputs: Tensor) -> Tensor:
        ctx.job, ctx.needs_grad = job, ctx.needs_input_grad[1:]
        ctx.devices = [x.device for x in inputs]
        out = job.forward(inputs, ctx.needs_grad)
        if not job.differentiable:
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a shared call has no second derivative: make it under steerfm.distributed.alone()")
        return None, *ctx.job.backward(gradients[0], ctx.needs_grad, ctx.devices)


@dataclass(frozen=True)
class _Form:
    """The memory layout of rows, on which the rounding of sums depends."""

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

    def join_rows(self, group: Group, parts: Sequence[Tensor], rows: Sequence[int], device: torch.device) -> Tensor:
        """All rows, in the layout of the parts."""
        mine = torch.cat([part.permute(self.order) for part in parts]).contiguous() if parts else None
        sizes = [self.shape[axis - 1] for axis in self.order[1:]]
        out = group.gather(mine, rows, sizes, torch.empty(0, dtype=self.dtype, device=device))
        return out.permute([self.order.index(axis) for axis in range(len(self.order))])


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one with the same message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _bytes(text: bytes, size: int) -> Tensor:
    """Bytes as a tensor (size,), padded with zeros."""
    return torch.frombuffer(bytearray(text.ljust(size, b"\0")), dtype=torch.uint8)
