"""Is A better than B, by how much, how sure: from pairs of the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerfm import cli
from steerfm.metrics import paired_difference
from steerfm.values import write_yaml

pytestmark = pytest.mark.slow
SUITE = {
    "problems": {"shirt": {"reward": "brightness", "judge": "symmetry"}, "bag": {"reward": "brightness", "judge": "sharpness"}},
    "methods": {"best_of_n": {"steps": 1}, "funnel": {"steps": 2}, "late": {"name": "das", "steps": 20}},
    "strengths": [50], "budgets": [8, 16], "seeds": 4, "n": 2, "out": "run",
}  # fmt: skip


def test_pairs_tell_what_means_do_not():
    """A shift of .1 below a spread of 1 that both share: its interval covers it in 95% of all sets, and leaves out 0."""
    stream = torch.Generator().manual_seed(0)
    shared = torch.randn(2000, 40, generator=stream)
    a, b = (shared + 0.1 * torch.randn(2000, 40, generator=stream) + shift for shift in (0.1, 0.0))
    made = [paired_difference(*pair) for pair in zip(a, b)]
    covered = sum(abs(d.mean - 0.1) <= d.half for d in made) / len(made)
    assert abs(covered - 0.95) < 4 * (0.05 * 0.95 / 2000) ** 0.5 + 0.01  # a normal interval of 40 is a little narrow
    assert sum(d.is_sure for d in made) > 0.95 * len(made) and made[0].pairs == 40
    assert made[0].better("A", "B") == "A" and paired_difference(b[0], a[0]).better("A", "B") == "B"
    same = [paired_difference(x + torch.randn(40, generator=stream), x + torch.randn(40, generator=stream)) for x in shared]
    assert 0.02 < sum(d.is_sure for d in same) / len(same) < 0.09
    assert not paired_difference([1.0], [0.0]).is_sure and "cannot" in paired_difference([1.0], [0.0]).better("A", "B")
    assert paired_difference([1.0, 2.0], [0.0, 1.0]).is_sure
    with pytest.raises(ValueError, match="no pairs: "):
        paired_difference([1.0, 2.0], [1.0])


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(write_yaml(SUITE))


def measured() -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in Path("run/cells").iterdir()}


def test_a_suite_says_it_and_measures_nothing_again(suite, capsys):
    assert cli.main(["bench", "mine.yaml"]) == 0
    before = measured()
    assert "over best_of_n," not in capsys.readouterr().out
    for a, b in (("funnel", "best_of_n"), ("best_of_n", "funnel"), ("funnel", "unsteered, 4 jumps")):
        assert cli.main(["bench", "mine.yaml", f'difference=[{a},"{b}"]']) == 0
        assert measured() == before
        shown = capsys.readouterr().out
        assert f"held-out reward of {a} over {b}, 8 pairs of the same seed" in shown
        told = json.loads(Path("run/summary.json").read_text())
        rows = {(row["problem"], row["budget"], row["method"]): row for row in told["rows"]}
        assert [(of["problem"].split(",")[0], of["budget"]) for of in told["differences"]] == [
            ("shirt", 8), ("shirt", 16), ("bag", 8), ("bag", 16),
        ]  # fmt: skip
        page = Path("run/report.html").read_text()
        for of in told["differences"]:
            problem, budget = of["problem"].split(",")[0], of["budget"]
            means = [rows[problem, 0 if "jumps" in name else budget, name]["held_out"] for name in (a, b)]
            assert of["mean"] == pytest.approx(means[0] - means[1], abs=1e-5) and of["pairs"] == 8 and of["of"] == [a, b]
            assert f"{of['mean']:+.3f}" in shown and f"{of['mean']:+.3f}" in page
            row = rows[problem, budget, "funnel"]
            if a == "funnel":
                key = "over_best_of_n" if b == "best_of_n" else "over_unsteered"
                assert of["half"] == pytest.approx(row[f"{key}_half"]) and of["mean"] == pytest.approx(row[key])


def test_what_is_no_pair_is_refused_before_anything_is_measured(suite, capsys):
    for asked, words in {
        "[funel,best_of_n]": "did you mean 'funnel'",
        "[funnel]": "give two methods",
        "[funnel,funnel]": "give two methods",
        "[funnel,best_of_n,late]": "give two methods",
    }.items():
        assert cli.main(["bench", "mine.yaml", f"difference={asked}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and not Path("run").exists()
    assert cli.main(["bench", "mine.yaml", "only=[funnel]", "difference=[funnel,late]"]) == 2
