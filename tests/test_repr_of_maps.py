"""A map prints in a line."""

import pytest
import torch

import steerfm
from steerfm.capabilities import ENDPOINT
from steerfm.flowmap import FlowMap, Guided, Microbatched


@pytest.mark.parametrize(
    ("name", "words"), [("fashion", ["1 x 28 x 28", "10 classes", "M parameters"]), ("emoji", ["3 x 32 x 32"])]
)
def test_shipped_maps(name, words):
    shown = repr(steerfm.load(name))
    assert len(shown) < 120 and "\n" not in shown
    assert all(word in shown for word in [*words, "jumps between any two times"])


def test_what_is_around_a_map_is_around_its_line():
    inner = FlowMap((2,), class_names=("a", "b", "c"))
    inner.capabilities = ENDPOINT
    assert repr(inner) == "FlowMap(2, jumps to the data, 3 classes)"
    assert repr(Microbatched(Guided(inner, 2.5), 8)) == f"Microbatched(8 rows at a time, Guided(scale 2.5, {inner!r}))"


def test_maps_without_weights_and_with_few():
    mixture = steerfm.GaussianMixture([[0.0, 0.0]], [[1.0, 1.0]]).flow_map()
    assert "parameters" not in repr(mixture)
    assert repr(steerfm.VelocityModel(torch.nn.Linear(2, 2), (2,))) == "VelocityModel(2, a velocity, 6 parameters)"
