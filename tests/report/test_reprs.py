"""What a person prints fits one screen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import steerfm
from steerfm.steering import Trace

ROWS, COLUMNS = 24, 120


def trace(steps: int, n: int = 3, k: int = 4) -> Trace:
    stream = torch.Generator().manual_seed(0)
    value = torch.randn(steps, n, k, generator=stream)
    value[:, :, -1] = float("nan")  # a particle that a selection left out
    zeros = torch.zeros(steps, n, k)
    t, ess = torch.linspace(1 / steps, 1, steps), torch.rand(steps, n, generator=stream)
    return Trace(t, ess, torch.arange(steps * n).reshape(steps, n) % 2 == 0, zeros.long(), value, zeros)


@pytest.mark.parametrize("steps", [1, 2, 8, 19, 20, 21, 500])
def test_a_trace_is_a_table_of_one_screen(steps):
    """A line a step, as they went; of many the first and the last."""
    made = trace(steps)
    lines = repr(made).splitlines()
    assert len(lines) <= ROWS and max(map(len, lines)) <= COLUMNS and "tensor" not in repr(made)
    assert f"{steps} step" in lines[0] and "3 outputs of 4 particles" in lines[0]
    rows = {int(line.split()[0]): line.split()[1:] for line in lines[2:] if line.split()[0].isdigit()}
    assert {0, steps - 1} <= rows.keys() and (steps > 19 or len(rows) == steps)
    for step, (t, ess, resampled, value, *_) in rows.items():
        assert float(t) == pytest.approx(made.t[step].item(), abs=1e-2)
        assert float(ess.rstrip("%")) == pytest.approx(100 * made.ess[step].mean().item(), abs=1)
        assert resampled == f"{int(made.resampled[step].sum())}/3"
        assert float(value) == pytest.approx(made.value[step].nanmedian().item(), rel=1e-2)


def test_a_trace_tells_of_guidance_where_there_is_some():
    plain = trace(4)
    assert "guidance" not in repr(plain)
    guided = dataclasses.replace(plain, guidance_ratio=torch.full((4, 3, 4), 0.25))
    assert "guidance" in repr(guided) and all(line.endswith("0.25") for line in repr(guided).splitlines()[2:])


def test_a_trace_without_particles_left_prints():
    empty = dataclasses.replace(trace(3), value=torch.full((3, 3, 4), float("nan")))
    assert "nan" in repr(empty) and len(repr(empty).splitlines()) == 5


@pytest.mark.parametrize("name", steerfm.methods())
def test_what_methods_return_prints_in_one_screen(name):
    mixture = steerfm.GaussianMixture([[0.0, 1.0]], [[1.0, 1.0]])
    result = steerfm.steer(mixture.flow_map(), lambda x: -x.square().sum(1), steerfm.method(name), n=2, seeds=0)
    for thing in (result, result.trace, steerfm.method(name)):
        lines = repr(thing).splitlines()
        assert len(lines) <= ROWS and max(map(len, lines)) <= COLUMNS


def test_a_result_leaves_a_report(tmp_path):
    """From Python: the samples, both pictures, and a page that needs no other file."""
    result = steerfm.steer("fashion", "brightness", "best_of_n", n=2, seeds=0, label="Bag", lookaheads=True)
    page = result.report(tmp_path / "run", "Bright bags", "best_of_n")
    assert {file.name for file in page.parent.iterdir()} >= {"report.html", "grid.png", "trace.png", "samples.safetensors"}
    text = page.read_text()
    assert text.count("<img") == 2 and "Bright bags" in text and all(word in text for word in ("strength", "ESS", "particles"))
    assert steerfm.SteeringResult.load(page.parent).samples.equal(result.samples)
    mixture = steerfm.GaussianMixture([[0.0, 1.0]], [[1.0, 1.0]])
    vectors = steerfm.steer(mixture.flow_map(), lambda x: -x.square().sum(1), steerfm.method("funnel"), n=2, seeds=0)
    assert vectors.report(tmp_path / "vectors").read_text().count("<img") == 1
