"""The ledger: what is counted, where, and what is not."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from steerfm import cost
from steerfm.cost import Cost, Ledger, count, count_backward


def test_counts_go_to_the_active_ledger():
    count("forwards", 5)  # nowhere
    with Ledger() as ledger:
        count("forwards", 2)
        count("forwards", 3)
        count("decodes", 1)
    count("forwards", 7)
    assert (ledger.cost.forwards, ledger.cost.decodes, ledger.cost.backwards) == (5, 1, 0)


def test_ledgers_nest():
    with Ledger() as outer:
        count("forwards", 1)
        with Ledger() as middle:
            count("forwards", 10)
            with Ledger() as inner:
                count("forwards", 100)
        count("forwards", 1000)
    assert (outer.cost.forwards, middle.cost.forwards, inner.cost.forwards) == (1111, 110, 100)
    assert outer.cost.seconds >= middle.cost.seconds >= inner.cost.seconds > 0


def test_an_exception_keeps_the_counts_and_closes_the_ledger():
    with Ledger() as outer:
        with pytest.raises(KeyError), Ledger() as inner:
            count("reward_calls", 2)
            raise KeyError
        count("reward_calls", 1)
    assert (inner.cost.reward_calls, outer.cost.reward_calls) == (2, 3)
    assert inner.cost.seconds > 0
    count("reward_calls", 9)
    assert outer.cost.reward_calls == 3


def test_a_ledger_can_be_entered_again():
    ledger = Ledger()
    for _ in range(2):
        with ledger:
            count("forwards", 2)
            time.sleep(0.002)
    assert ledger.cost.forwards == 4
    assert ledger.cost.seconds >= 0.004


def test_backwards_are_counted_when_they_happen():
    x = torch.ones(3, requires_grad=True)
    with Ledger() as ledger:
        y = x * 2
        count_backward("backwards", 3, y)
        unused = x * 3
        count_backward("backwards", 5, unused)
        assert ledger.cost.backwards == 0
    y.sum().backward()  # also after the ledger is closed: it paid for the graph
    assert ledger.cost.backwards == 3


def test_each_backward_pass_counts():
    x = torch.ones(3, requires_grad=True)
    with Ledger() as outer, Ledger() as inner:
        y = x * 2
        count_backward("reward_backwards", 1, y)
        for _ in range(2):
            torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert outer.cost.reward_backwards == inner.cost.reward_backwards == 2


def test_no_hook_without_a_graph_or_a_ledger():
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    count_backward("backwards", 3, y)  # no ledger
    with Ledger() as ledger:
        with torch.no_grad():
            count_backward("backwards", 3, x * 2)
        with torch.inference_mode():
            count_backward("backwards", 3, torch.ones(2))
        y.sum().backward()
    assert ledger.cost.backwards == 0


def test_costs_add_up():
    a = Cost(1, 2, 3, 4, 5, 6.5, 700)
    b = Cost(10, 20, 30, 40, 50, 60.0, 7)
    assert a + b == Cost(11, 22, 33, 44, 55, 66.5, 700)
    assert a == Cost(1, 2, 3, 4, 5, 6.5, 700)  # unchanged
    assert sum([a, b], Cost()) == a + b
    assert replace(Cost(), **a.as_dict()) == a
    assert list(a.as_dict()) == [
        "forwards", "backwards", "reward_calls", "reward_backwards", "decodes", "seconds", "peak_bytes",
    ]  # fmt: skip


def test_peak_memory_of_the_process():
    with Ledger() as ledger:
        pass
    assert ledger.cost.peak_bytes > 10 * 2**20  # a Python with torch in it


def test_an_inner_ledger_does_not_hide_the_peak_of_the_outer(monkeypatch):
    """An accelerator has one peak counter, which every ledger resets."""
    card = SimpleNamespace(peak=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(card, "peak", 0))
    monkeypatch.setattr(cost, "_peak_bytes", lambda: card.peak)
    with Ledger() as outer:
        card.peak = 900
        with Ledger() as middle:
            card.peak = 100
            with Ledger() as inner:
                card.peak = 500
            card.peak = 200
        card.peak = 300
    assert (outer.cost.peak_bytes, middle.cost.peak_bytes, inner.cost.peak_bytes) == (900, 500, 500)


def test_a_backward_pass_counts_as_two_evaluations():
    assert Cost(forwards=5, backwards=3).evaluations == 11
