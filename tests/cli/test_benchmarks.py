"""The benchmarks run, from the command line, and end in one JSON line."""

import json
import math

import pytest

import steerfm
from steerfm import cli
from steerfm.networks import UNet
from steerfm.steering import METHODS


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_claims_are_a_table_of_z_scores_and_are_not_measured_twice(tmp_path, capsys):
    ask = ["bench", "exact", "--claims", "--cases", "grid", "--budgets", "64", "--seeds", "8", "--out", str(tmp_path)]
    for _ in range(2):
        assert cli.main([*ask, "--methods", "funnel", "best_of_n", "multi_round"]) == 0
        shown = capsys.readouterr().out
        assert "funnel" in shown and "best_of_n" in shown and "multi_round" not in shown
        cells = json.loads((tmp_path / "claims.json").read_text())
        assert {key.split("/")[2] for key in cells} == {"funnel", "best_of_n"}
        assert all(cell["cost"] <= 64 and abs(cell["z_z"]) < 6 for cell in cells.values())
    with pytest.raises(SystemExit):
        cli.main(["bench", "exact", "--claims", "--cases", "line", "--out", str(tmp_path)])
    assert "deep" in capsys.readouterr().err


@pytest.mark.slow
def test_all_methods_on_an_exact_target(tmp_path, capsys):
    assert cli.main(["bench", "exact", "--quick", "--cases", "line", "--seeds", "2", "--out", str(tmp_path)]) == 0
    found = last_line(capsys)
    assert set(found["distance"]) == {"line"} and (tmp_path / "line.png").is_file()
    for case in found["distance"].values():
        assert set(case) >= set(METHODS) - {"steering", "mfm_g", "mfm_gf"}  # too dear for so few evaluations
        assert all(math.isfinite(value) for cells in case.values() for value in cells.values())
        assert case["funnel"]["256"] < case["dps"]["256"]  # particles are nearer to the target than an ascent


@pytest.mark.slow
def test_draws_of_a_posterior_map_on_a_ring(capsys):
    assert cli.main(["bench", "posterior", "--steps", "300", "--states", "2", "--draws", "200"]) == 0
    line = last_line(capsys)
    rows, chains = line["rows"], line["waltz"]
    assert sum(rows["floor"]) < sum(rows["1 call"]) < 0.8 * sum(rows["GLASS, 2 calls"])
    assert chains["floor"] < chains["1 call"] < 0.5 * chains["no reward"]


@pytest.mark.slow
def test_draws_of_a_posterior_map_of_pictures(capsys, tmp_path):
    architecture = {"name": "unet", "channels": 1, "widths": [8, 8], "blocks": 1, "posterior": True}
    flow_map = steerfm.NeuralFlowMap(UNet(1, (8, 8), 1, posterior=True), (1, 28, 28), mean=-0.4, std=0.7)
    flow_map.save(tmp_path / "joint", architecture)
    arguments = ["--classifier", "fashion-classifier", "--states", "2", "--draws", "8", "--fine", "2", "--times", "0.4"]
    assert cli.main(["bench", "posterior", "--model", str(tmp_path / "joint.safetensors"), *arguments]) == 0
    result = last_line(capsys)
    for measure in ("distance", "value", "frequency"):  # at the start the map is that of a Gaussian, and its draws are exact
        assert result[measure]["1 call"].keys() == {"0.4"}
    assert result["distance"]["1 call"]["0.4"] < 1.5 * result["distance"]["fine draws again"]["0.4"]
