"""Every shipped model, data set and method keeps the contract that `steerfm.testing` has for those of others."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

import steerfm
from steerfm import zoo
from steerfm.plugins import data_sets
from steerfm.steering import METHODS
from steerfm.testing import check_data, check_method, check_model

MAPS = [name for name, head in zoo.models().items() if head["kind"] == "flow_map"]
SMALL = {"particles": 4, "steps": 2, "children": 2, "first": 8, "budget": 6, "rounds": 2, "iterations": 2}


def small(method: Any) -> Any:
    """The method with fewer particles and steps: its contract does not depend on them."""
    names = {field.name for field in fields(method)}
    sizes = {name: size for name, size in SMALL.items() if name in names and isinstance(getattr(method, name), int)}
    return replace(method, **{name: min(size, getattr(method, name)) for name, size in sizes.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    check_method(small(METHODS[name]()))


@pytest.mark.parametrize("name", MAPS)
def test_models(name):
    check_model(steerfm.load(name))


def test_models_around_models():
    flow_map = steerfm.load("fashion")
    check_model(steerfm.Guided(flow_map, 2.0))
    check_model(steerfm.flowmap.Microbatched(flow_map, 3))


# a folder holds whatever its owner has put there: tests/training/test_folder.py
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.data(name)) for name in data_sets() if name != "folder"])
def test_data(name):
    check_data(data_sets()[name].load()())
