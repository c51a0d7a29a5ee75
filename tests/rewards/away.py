"""A reward that is elsewhere, the same one here, and what a run says: for the tests beside this file and their processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steerfm
from steerfm import distributed, zoo
from steerfm.flowmap import Wrapped

Events = list[tuple[str, int]]


def value(images: Tensor, broken: bool) -> Tensor:
    flat = images.flatten(1)
    spread = flat.std(1)
    return spread.masked_fill(spread < 0.235, float("nan")) if broken else spread


class Here(steerfm.Reward):
    differentiable = False
    name = "away"

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken

    def score(self, images: Tensor, prompts: Any = None, labels: Any = None, groups: Any = None) -> Tensor:
        return value(images, self.broken)


class Away(steerfm.Reward):
    """The same from another thread; ``events`` are what was sent and waited for, with the number of pictures."""

    differentiable = False
    elsewhere = True
    one_process = True

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken, self.events = broken, []

    def send(self, images: Tensor, prompts: Any = None, labels: Any = None, groups: Any = None) -> Callable[[], Tensor]:
        self.events.append(("sent", len(images)))
        box: list[Tensor] = []
        thread = threading.Thread(target=lambda: box.append(value(images, self.broken)))
        thread.start()

        def wait() -> Tensor:
            thread.join()
            self.events.append(("waited", len(images)))
            return box[0]

        return wait


class Watched(Wrapped):
    """The shipped map of clothes, which notes its calls among the events."""

    def __init__(self, events: Events) -> None:
        super().__init__(zoo.load("fashion"))
        self.events = events

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.events.append(("network", len(x)))
        return super().average_velocity(x, s, t, cond)


def numbers(result: steerfm.SteeringResult) -> dict[str, Tensor]:
    """All that a result says, but for time and memory."""
    out = {"samples": result.samples, "rewards": result.rewards, "log_weights": result.log_weights}
    out |= {f"trace {name}": value for name, value in vars(result.trace).items() if isinstance(value, Tensor)}
    return out | {"cost": torch.tensor(list(result.cost.counts().values()))}


def run(elsewhere: bool = True, reward: steerfm.Reward | None = None) -> dict[str, Tensor]:
    reward = reward or (Away() if elsewhere else Here())
    method = {"name": "feynman_kac", "particles": 8, "steps": 3}
    mixed = 1.0 * reward + 0.5 * steerfm.reward("sharpness")
    return numbers(steerfm.steer("fashion", mixed, method, n=2, strength=8.0, label="Bag", micro_batch=3))


def run_with_events() -> tuple[dict[str, Tensor], Events]:
    """And what the first process sent; no other did."""
    reward = Away()
    values = run(reward=reward)
    assert distributed.first() or not reward.events
    return values, reward.events
