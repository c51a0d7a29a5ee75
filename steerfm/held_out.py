"""Check that a judge is held out: that it shares no networks, weights or arithmetic with the reward.

The search visits all parts of both: sums, ensembles, wrappers, containers, and functions with their closures and globals.
Shared weights are detected by memory and by value. So two names of one file, a copy in another precision and a lightly tuned
copy count as the same network. Networks that a reward loads late are loaded for the check. Rewards without weights are the
same if their type, or their function, and their arguments are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.flowmap import FlowMap
from steerfm.rewards import Reward, RewardError

NEAR = 0.01
"""Weights count as equal below this difference, relative to their spread: as much as copies in bfloat16 differ."""
SHARE = 0.01
"""Networks count as shared above this share of the smaller one: tables of positions are equal in unrelated networks."""
SAMPLE = 64
"""Entries of each tensor for a first comparison."""
MODULE = set(vars(nn.Module()))
"""Attributes that every module has."""
IDLE = MODULE | {"name", "batch_size", "_fits"}
"""Attributes of a reward that do not affect its values."""
IN_WORDS = {"held_out": "held-out reward", "reward": "reward"}
"""Names of the score that counts, for tables and reports."""
Key = Hashable


def check_held_out(reward: Reward, judge: Reward | None) -> None:
    """Check that a judge is not the reward itself and shares no weights with it.

    Raises:
        RewardError: it is, or does; the message names the fix.
    """
    if judge is not None and (why := in_common(reward, judge)):
        raise RewardError(
            f"judge={judge.name}: it {why}, so nothing would be held out: judge=null for none, or a reward that is no part "
            f"of {reward.name!r} and shares no network with it"
        )


def in_common(reward: Reward, judge: Reward) -> str | None:
    """Why a judge is not held out, as a text after its name; None if it is held out.

    A term without weights may occur in both if the judge has another term as well: its other terms, such as a separate
    network, still judge independently.
    """
    if judge is reward:
        return "is the reward itself"
    mine, its = list(_walk(reward)), list(_walk(judge))
    if _share(mine, its):
        return "shares weights with the reward"
    reward_keys, judge_keys = ({_leaf_key(leaf) for leaf in _leaves(parts)} for parts in (mine, its))
    if judge_keys <= reward_keys:
        return "is the reward itself" if judge_keys == reward_keys else "is a part of the reward"
    return None


def share_weights(a: Any, b: Any) -> bool:
    """Whether two rewards, networks or other objects share weights."""
    return _share(list(_walk(a)), list(_walk(b)))


def has_weights(reward: Reward) -> bool:
    """Whether a reward has a network in this process."""
    return any(isinstance(part, nn.Parameter | _Late) for part in _walk(reward))


# --- weights ---------------------------------------------------------------------------------------------------------
def _share(mine: Sequence[Any], its: Sequence[Any]) -> bool:
    """Whether two lists of parts share a network; late networks are loaded if both sides have networks."""
    if not all(any(isinstance(part, nn.Parameter | _Late) for part in parts) for parts in (mine, its)):
        return False
    (a, names), (b, others) = _networks(mine), _networks(its)
    if names & others:
        return True
    smaller = min(sum(w.numel() for w in a), sum(w.numel() for w in b))
    return smaller > 0 and _numbers_in_common(a, b) > SHARE * smaller


class _Late:
    """A reward with networks that are no submodules of it and load late."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward


def _networks(parts: Iterable[Any]) -> tuple[list[Tensor], set[str]]:
    """The weights of all networks, and the names of networks that run elsewhere."""
    weights, names = {}, set()
    for part in parts:
        late = part.reward.late_networks() if isinstance(part, _Late) else ()
        names |= {network for network in late if isinstance(network, str)}
        parameters = [part] if isinstance(part, nn.Parameter) else []
        for network in late:
            parameters += [inner for inner in _walk(network) if isinstance(inner, nn.Parameter)]
        weights |= {id(weight): weight.detach() for weight in parameters if weight.is_floating_point() and not weight.is_meta}
    return list(weights.values()), names


def _numbers_in_common(a: Sequence[Tensor], b: Sequence[Tensor]) -> int:
    """Number of weights in ``a`` that are also in ``b``: in the same memory, or in a tensor of the same shape with nearly the
    same values."""
    memory = {weight.untyped_storage().data_ptr() for weight in b} - {0}
    shapes: dict[torch.Size, list[Tensor]] = {}
    for weight in b:
        shapes.setdefault(weight.shape, []).append(weight)
    total = 0
    for shape in {weight.shape for weight in a}:
        own, others = [weight for weight in a if weight.shape == shape], shapes.get(shape, [])
        near = _near(torch.stack([_sample(w) for w in own]), torch.stack([_sample(w) for w in others])) if others else None
        for i, weight in enumerate(own):
            same_memory = weight.untyped_storage().data_ptr() in memory
            rows = [] if near is None else near[i].nonzero().flatten().tolist()
            if same_memory or any(bool(_near(_flat(weight)[None], _flat(others[j])[None])) for j in rows):
                total += weight.numel()
    return total


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Whether rows (p, d) equal rows (q, d) up to rounding, (p, q); constant rows equal none."""
    spread = (a - a.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") < NEAR * spread


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten().to("cpu", torch.float32)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    return _flat(flat[torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat)), device=flat.device).long()])


# --- parts -----------------------------------------------------------------------------------------------------------
def _walk(start: Any) -> Iterator[Any]:
    """All objects that a reward can reach: rewards, parameters and others. Flow maps are skipped."""
    waiting, visited = [start], {}
    while waiting:
        part = waiting.pop()
        if id(part) in visited or isinstance(part, FlowMap | ModuleType | type | str | bytes | int | float | None):
            continue
        visited[id(part)] = part  # a reference, so that no other object gets this id
        yield part
        if isinstance(part, Reward) and type(part).late_networks is not Reward.late_networks:
            yield _Late(part)
        waiting += _inside(part)


def _inside(part: Any) -> list[Any]:
    """The contents of an object, or the closure and globals of a function."""
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, list | tuple | set | frozenset):
        return list(part)
    if isinstance(part, partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, FunctionType):
        values = _globals(part).values()
        return [*_closure(part).values(), *(value for value in values if isinstance(value, nn.Module | partial | FunctionType))]
    if (
        isinstance(part, Tensor)
        or not hasattr(part, "__dict__")
        or type(part).__module__.split(".")[0] in ("builtins", "numpy")
    ):
        return []
    return [*vars(part).values(), *_of_class(type(part))]


def _of_class(kind: type) -> list[Any]:
    """Networks and functions in the attributes of a user's class."""
    own = [cls for cls in kind.__mro__ if cls.__module__.split(".")[0] not in ("builtins", "torch", "steerfm", "abc", "typing")]
    return [value for cls in own for value in vars(cls).values() if isinstance(value, nn.Module | FunctionType)]


def _closure(function: FunctionType) -> dict[str, Any]:
    """The closure and the defaults of a function."""
    out: dict[str, Any] = dict(function.__kwdefaults__ or {})
    out |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            out[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return out


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that a function uses; only those functions that are in its own file."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    values = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return {
        name: value for name, value in values.items()
        if not isinstance(value, FunctionType) or value.__globals__ is function.__globals__
    }  # fmt: skip


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _codes(part)


# --- rewards without weights -----------------------------------------------------------------------------------------
def _leaves(parts: Sequence[Any]) -> list[Reward]:
    """The rewards among the parts that contain no other rewards."""
    rewards = [part for part in parts if isinstance(part, Reward)]
    return [reward for reward in rewards if not any(isinstance(part, Reward) for part in _walk(reward) if part is not reward)]


def _leaf_key(leaf: Reward) -> Key:
    """Identity of a reward with networks, which are compared by weights; else its value."""
    return id(leaf) if any(isinstance(part, nn.Parameter | _Late) for part in _walk(leaf)) else _key(leaf, {})


def _key(part: Any, outer: dict[int, int]) -> Key:
    """A key of an object's value: equal for two objects with the same arguments and the same code in the same file.

    Args:
        part: the object.
        outer: numbers of the enclosing objects, by id.
    """
    if isinstance(part, str | bytes | int | float | complex | None):
        return ("value", part)
    if id(part) in outer:
        return ("again", outer[id(part)])
    outer = {**outer, id(part): len(outer)}
    if isinstance(part, Tensor):
        values = part.detach().cpu().flatten()
        return ("tensor", tuple(part.shape), hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest())
    if isinstance(part, Mapping):
        return ("mapping", tuple((str(name), _key(value, outer)) for name, value in part.items()))
    if isinstance(part, list | tuple):
        return ("list", tuple(_key(value, outer) for value in part))
    if isinstance(part, set | frozenset):
        return ("set", tuple(sorted(map(repr, part))))
    if isinstance(part, partial):
        return ("partial", *(_key(value, outer) for value in (part.func, part.args, dict(sorted(part.keywords.items())))))
    if isinstance(part, MethodType):
        return ("method", _key(part.__func__, outer), _key(part.__self__, outer))
    if isinstance(part, FunctionType):
        plain = str | int | float | Tensor | FunctionType
        used = {name: value for name, value in _globals(part).items() if isinstance(value, plain)}
        place = (part.__code__.co_filename, part.__qualname__, _code_key(part.__code__))
        return ("function", place, _key(_closure(part), outer), _key(used, outer))
    if isinstance(part, type) or not hasattr(part, "__dict__"):
        return ("kind", part.__module__, part.__qualname__) if isinstance(part, type) else ("a", type(part).__qualname__)
    return ("object", _class_key(type(part)), _key(_state(part), outer))


def _state(part: Any) -> dict[str, Any]:
    """The attributes of an object that affect its values."""
    if not isinstance(part, nn.Module):
        return dict(sorted(vars(part).items()))
    attributes = {name: value for name, value in vars(part).items() if name not in IDLE}
    return dict(sorted({**attributes, **dict(part.named_buffers(recurse=False)), **dict(part.named_children())}.items()))


def _class_key(kind: type) -> Key:
    """A key of a class: its name, and the files and code of its functions. A user's file runs again for each name in it, which
    makes new class objects."""
    own = {name: value.__code__ for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    return (kind.__qualname__, tuple((name, code.co_filename, _code_key(code)) for name, code in sorted(own.items())))


def _code_key(code: CodeType) -> Key:
    constants = tuple(_code_key(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts)
    return (code.co_code, constants, code.co_names)
