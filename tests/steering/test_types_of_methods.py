"""What a type checker knows of a method by name: this file is read by pyright, too, and has no `Any` of its own."""

from typing_extensions import assert_type

import steerfm
from steerfm.steering import METHODS, Method
from steerfm.steering.outcome import Fits, Fitting


def test_a_method_by_name_fits_itself_into_a_budget():
    named = steerfm.method("funnel")
    assert_type(named, Fitting)
    assert named.within(64).particles == steerfm.Funnel.within(64).particles
    assert steerfm.method({"name": "fmrg_j", "stop": 0.8}).within(64).stop == 0.8
    assert steerfm.method("best_of_n", steps=2).within(64, steps=1).steps == 1


def test_a_method_that_is_there_stays_what_it_is():
    tds: steerfm.TDS = steerfm.TDS(particles=4)  # constructors take names of parts, so their type is Any
    mine = steerfm.method(tds)
    assert_type(mine, steerfm.TDS)
    assert mine.within(64).steps == steerfm.TDS.within(64).steps


def test_all_fit():
    def both(method: Fitting) -> Method:
        return method

    for name in steerfm.methods():
        assert isinstance(both(steerfm.method(name)), Fits) and callable(METHODS[name]().check)
