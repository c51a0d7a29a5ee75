"""`help` of a method is a screen, and its objects complete as before."""

from __future__ import annotations

import inspect
import pydoc
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

import steerfm

SCREEN = 55


def help_of(kind: type) -> str:
    return pydoc.render_doc(kind, renderer=pydoc.plaintext)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", steerfm.methods())
def test_help_is_a_screen_with_the_docstring_and_an_argument_a_line(name):
    method: Any = steerfm.method(name)
    kind = type(method)
    lines = [line.removeprefix(" |  ") for line in help_of(kind).splitlines()]
    assert len(lines) <= SCREEN, len(lines)
    assert all(line.strip() in [shown.strip() for shown in lines] for line in (inspect.getdoc(kind) or "").splitlines())
    assert is_dataclass(kind)
    arguments = [each.name for each in sorted(fields(kind), key=lambda each: bool(each.kw_only)) if each.init]
    shown = [line.strip().partition(":")[0] for line in lines[lines.index(f"{kind.__name__}(") + 1 : lines.index(")")]]
    assert [one for one in shown if one != "*,"] == arguments
    assert list(inspect.signature(kind).parameters) == arguments
    assert "object at 0x" not in "\n".join(lines) and "<factory>" not in "\n".join(lines)
    assert "inherited from" not in "\n".join(lines)


@pytest.mark.parametrize("name", steerfm.methods())
def test_objects_complete_with_all_that_they_have(name):
    method: Any = steerfm.method(name)
    assert {"check", "run", "particles", "__init__"} <= set(dir(method))
    assert {each.name for each in fields(method)} <= set(dir(method))


def test_what_a_class_adds_is_in_its_help():
    assert "Within a budget: 4 steps" in help_of(steerfm.Funnel) and "paper = " in help_of(steerfm.FeynmanKac)
    assert "resolve" not in help_of(steerfm.FeynmanKac) and "steps_of" not in help_of(steerfm.Funnel)
