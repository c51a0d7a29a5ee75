"""What a value is, where its type says less: a test that is wrong about it fails here, and type checkers follow."""

from __future__ import annotations

from typing import TypeVar

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
