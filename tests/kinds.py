"""What a value is, where its type says less: a test that is wrong about it fails here, and type checkers follow; and checks
that several tests make."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

import steerfm
from steerfm import zoo
from steerfm.networks import ConvNet, ResNet

T = TypeVar("T")


def sure(value: T | None) -> T:
    """A value that is not None."""
    assert value is not None
    return value


def a(kind: type[T], value: object) -> T:
    """A value of this type."""
    assert isinstance(value, kind), f"a {type(value).__name__} in place of a {kind.__name__}"
    return value


def classifier(name: str) -> ConvNet | ResNet:
    """The network of a classifier, by name or path."""
    network = zoo.load_classifier(name)[0]
    assert isinstance(network, ConvNet | ResNet)
    return network


def check_outputs_are_independent(
    flow_map: Any, reward: Any, method: Any, strength: Tensor, rows: int, nan: bool = False
) -> None:
    """Four outputs, of a strength each, are the same in another order, in batches of three, and ``rows`` rows at a time.

    Args:
        nan: whether a trace may hold NaN where nothing was looked at.
    """
    seeds, order = [4, 5, 6, 7], torch.tensor([2, 0, 3, 1])
    result = steerfm.steer(flow_map, reward, method, n=4, seeds=seeds, strength=strength)
    for other, index in (
        (steerfm.steer(flow_map, reward, method, n=4, seeds=[6, 4, 7, 5], strength=strength[order]), order),
        (steerfm.steer(flow_map, reward, method, n=4, seeds=seeds, strength=strength, batch_size=3), slice(None)),
        (steerfm.steer(flow_map, reward, method, n=4, seeds=seeds, strength=strength, micro_batch=rows), slice(None)),
    ):
        torch.testing.assert_close(other.samples, result.samples[index])
        torch.testing.assert_close(other.trace.value, result.trace.value[:, index], equal_nan=nan)
