"""Is a judge held out? What a reward and the reward that judges it have in common: networks, weights, arithmetic.

Both are walked through, whatever holds their parts: sums, ensembles, wrappers, containers, functions with what they close over
or name. Weights in common are found by their memory, and by their values, so that two names of one file, a copy in another
precision and a lightly tuned one are the same. Networks that a reward loads late are loaded. Rewards without weights are the
same where their type, or their function, and their arguments are.
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
"""Weights that differ by less, as a share of how far they lie from their mean, are the same: so far go copies in bfloat16."""
SHARE = 0.01
"""Share of the smaller network that makes two networks one: tables of positions are alike in networks that never met."""
SAMPLE = 64
"""Entries of each tensor that are compared first."""
MODULE = set(vars(nn.Module()))
"""What every module has of its own."""
IDLE = MODULE | {"name", "batch_size", "_fits"}
"""Attributes of a reward that its values do not depend on."""
IN_WORDS = {"held_out": "held-out reward", "reward": "reward"}
"""What counts, as tables and reports say it: the judge's, or the reward's where there is no judge."""
Key = Hashable


def check_held_out(reward: Reward, judge: Reward | None) -> None:
    """Refuse a judge that is the reward itself, or that shares weights with it.

    Raises:
        RewardError: with what they have in common, and what to do.
    """
    if judge is not None and (why := in_common(reward, judge)):
        raise RewardError(
            f"judge={judge.name}: it {why}, and nothing would be held out: judge=null for none, or a reward that is no part "
            f"of {reward.name!r} and shares no network with it"
        )


def in_common(reward: Reward, judge: Reward) -> str | None:
    """Why a judge is not held out from a reward, in words that follow its name; None where it is.

    A term without weights may be in both where the judge has another one besides: a brightness that is asked for is no
    secret, and a network of its own still judges the picture.
    """
    if judge is reward:
        return "is the reward itself"
    mine, its = list(_walk(reward)), list(_walk(judge))
    if _share(mine, its):
        return "shares weights with the reward"
    known, asked = ({_leaf_key(leaf) for leaf in _leaves(parts)} for parts in (mine, its))
    if asked <= known:
        return "is the reward itself" if asked == known else "is a part of the reward"
    return None


def share_weights(a: Any, b: Any) -> bool:
    """Whether two rewards, networks, or what else holds some, have weights in common."""
    return _share(list(_walk(a)), list(_walk(b)))


def has_weights(reward: Reward) -> bool:
    """Whether a network is in it, as far as can be seen: one that runs elsewhere is not."""
    return any(isinstance(part, nn.Parameter | _Late) for part in _walk(reward))


# --- weights ---------------------------------------------------------------------------------------------------------
def _share(mine: Sequence[Any], its: Sequence[Any]) -> bool:
    """Whether two lists of parts have a network in common; those that come late are loaded where both have networks."""
    if not all(any(isinstance(part, nn.Parameter | _Late) for part in parts) for parts in (mine, its)):
        return False
    (a, names), (b, others) = _networks(mine), _networks(its)
    if names & others:
        return True
    smaller = min(sum(w.numel() for w in a), sum(w.numel() for w in b))
    return smaller > 0 and _numbers_in_common(a, b) > SHARE * smaller


class _Late:
    """The networks of a reward that are no submodules of it, not loaded yet."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward


def _networks(parts: Iterable[Any]) -> tuple[list[Tensor], set[str]]:
    """The weights of all networks, and the names of those that run elsewhere."""
    weights, names = {}, set()
    for part in parts:
        late = part.reward.late_networks() if isinstance(part, _Late) else ()
        names |= {network for network in late if isinstance(network, str)}
        found = [part] if isinstance(part, nn.Parameter) else []
        for network in late:
            found += [inner for inner in _walk(network) if isinstance(inner, nn.Parameter)]
        weights |= {id(weight): weight.detach() for weight in found if weight.is_floating_point() and not weight.is_meta}
    return list(weights.values()), names


def _numbers_in_common(a: Sequence[Tensor], b: Sequence[Tensor]) -> int:
    """How many numbers of ``a`` are those of ``b``: in the same memory, or in a tensor of the same shape and nearly the same
    values."""
    memory = {weight.untyped_storage().data_ptr() for weight in b} - {0}
    shapes: dict[torch.Size, list[Tensor]] = {}
    for weight in b:
        shapes.setdefault(weight.shape, []).append(weight)
    found = 0
    for shape in {weight.shape for weight in a}:
        own, others = [weight for weight in a if weight.shape == shape], shapes.get(shape, [])
        near = _near(torch.stack([_sample(w) for w in own]), torch.stack([_sample(w) for w in others])) if others else None
        for i, weight in enumerate(own):
            held = weight.untyped_storage().data_ptr() in memory
            rows = [] if near is None else near[i].nonzero().flatten().tolist()
            if held or any(bool(_near(_flat(weight)[None], _flat(others[j])[None])) for j in rows):
                found += weight.numel()
    return found


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Whether rows (p, d) are those of (q, d) up to rounding, (p, q); rows of one value are like none."""
    spread = (a - a.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") < NEAR * spread


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten().to("cpu", torch.float32)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    return _flat(flat[torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat)), device=flat.device).long()])


# --- parts -----------------------------------------------------------------------------------------------------------
def _walk(start: Any) -> Iterator[Any]:
    """All that a reward computes with: rewards, parameters and what else is reachable; a flow map is nobody's judge."""
    waiting, seen = [start], {}
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, FlowMap | ModuleType | type | str | bytes | int | float | None):
            continue
        seen[id(part)] = part  # held, so that no other object gets its number
        yield part
        if isinstance(part, Reward) and type(part).late_networks is not Reward.late_networks:
            yield _Late(part)
        waiting += _inside(part)


def _inside(part: Any) -> list[Any]:
    """What an object holds, or a function closes over and names."""
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, list | tuple | set | frozenset):
        return list(part)
    if isinstance(part, partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, FunctionType):
        named = _named(part).values()
        return [*_closed(part).values(), *(value for value in named if isinstance(value, nn.Module | partial | FunctionType))]
    if (
        isinstance(part, Tensor)
        or not hasattr(part, "__dict__")
        or type(part).__module__.split(".")[0] in ("builtins", "numpy")
    ):
        return []
    return [*vars(part).values(), *_of_class(type(part))]


def _of_class(kind: type) -> list[Any]:
    """Networks and functions that a class of a reward, or of what one calls, holds for all."""
    own = [cls for cls in kind.__mro__ if cls.__module__.split(".")[0] not in ("builtins", "torch", "steerfm", "abc", "typing")]
    return [value for cls in own for value in vars(cls).values() if isinstance(value, nn.Module | FunctionType)]


def _closed(function: FunctionType) -> dict[str, Any]:
    """What a function closes over, and its defaults."""
    out: dict[str, Any] = dict(function.__kwdefaults__ or {})
    out |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            out[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return out


def _named(function: FunctionType) -> dict[str, Any]:
    """The globals that a function names; of functions only those of its own file."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return {
        name: value for name, value in found.items()
        if not isinstance(value, FunctionType) or value.__globals__ is function.__globals__
    }  # fmt: skip


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _codes(part)


# --- rewards without weights -----------------------------------------------------------------------------------------
def _leaves(parts: Sequence[Any]) -> list[Reward]:
    """The rewards of a walk that are not made of others."""
    rewards = [part for part in parts if isinstance(part, Reward)]
    return [reward for reward in rewards if not any(isinstance(part, Reward) for part in _walk(reward) if part is not reward)]


def _leaf_key(leaf: Reward) -> Key:
    """Of one that has networks, itself: others are told by their weights."""
    return id(leaf) if any(isinstance(part, nn.Parameter | _Late) for part in _walk(leaf)) else _key(leaf, {})


def _key(part: Any, seen: dict[int, int]) -> Key:
    """What an object is and holds, by value: equal for two that were made alike, from the same code in the same file.
    ``seen``: the objects around it."""
    if isinstance(part, str | bytes | int | float | complex | None):
        return ("value", part)
    if id(part) in seen:
        return ("again", seen[id(part)])
    seen = {**seen, id(part): len(seen)}
    if isinstance(part, Tensor):
        values = part.detach().cpu().flatten()
        return ("tensor", tuple(part.shape), hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest())
    if isinstance(part, Mapping):
        return ("mapping", tuple((str(name), _key(value, seen)) for name, value in part.items()))
    if isinstance(part, list | tuple):
        return ("list", tuple(_key(value, seen) for value in part))
    if isinstance(part, set | frozenset):
        return ("set", tuple(sorted(map(repr, part))))
    if isinstance(part, partial):
        return ("partial", *(_key(value, seen) for value in (part.func, part.args, dict(sorted(part.keywords.items())))))
    if isinstance(part, MethodType):
        return ("method", _key(part.__func__, seen), _key(part.__self__, seen))
    if isinstance(part, FunctionType):
        plain = str | int | float | Tensor | FunctionType
        named = {name: value for name, value in _named(part).items() if isinstance(value, plain)}
        place = (part.__code__.co_filename, part.__qualname__, _code_key(part.__code__))
        return ("function", place, _key(_closed(part), seen), _key(named, seen))
    if isinstance(part, type) or not hasattr(part, "__dict__"):
        return ("kind", part.__module__, part.__qualname__) if isinstance(part, type) else ("a", type(part).__qualname__)
    return ("object", _class_key(type(part)), _key(_state(part), seen))


def _state(part: Any) -> dict[str, Any]:
    """The attributes of an object that its values depend on."""
    if not isinstance(part, nn.Module):
        return dict(sorted(vars(part).items()))
    held = {name: value for name, value in vars(part).items() if name not in IDLE}
    return dict(sorted({**held, **dict(part.named_buffers(recurse=False)), **dict(part.named_children())}.items()))


def _class_key(kind: type) -> Key:
    """A class by its name, and by the files and code of its functions: files of one's own are run anew for each name in them,
    and then the class is another object."""
    own = {name: value.__code__ for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    return (kind.__qualname__, tuple((name, code.co_filename, _code_key(code)) for name, code in sorted(own.items())))


def _code_key(code: CodeType) -> Key:
    constants = tuple(_code_key(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts)
    return (code.co_code, constants, code.co_names)
