"""The benchmarks run, from the command line, and end in one JSON line."""

import json
import math

from steerfm import cli
from steerfm.steering import METHODS


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_all_methods_on_exact_targets(tmp_path, capsys):
    assert cli.main(["bench", "exact", "--quick", "--out", str(tmp_path)]) == 0
    found = last_line(capsys)
    assert set(found["distance"]) == {"line", "grid"} and (tmp_path / "line.png").is_file()
    for case in found["distance"].values():
        assert set(case) >= set(METHODS) - {"steering", "mfm_g", "mfm_gf"}  # too dear for so few evaluations
        assert all(math.isfinite(value) for cells in case.values() for value in cells.values())
        assert case["funnel"]["256"] < case["dps"]["256"]  # particles are nearer to the target than an ascent
