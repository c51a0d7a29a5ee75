"""A few kills of `benchmarks/kills.py`, which kills more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steerfm import shipped

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")


@pytest.mark.slow
def test_killed_runs_are_as_if_left_alone():
    script = Path(shipped.folder("benchmarks")) / "kills.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, "train", "--kills", "2"], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 of 2 as if left alone" in done.stdout, done.stdout + done.stderr[-2000:]


def test_kills_tell_runs_apart(tmp_path):
    """What it compares: every number but times, every tensor, and that nothing is missing or left over."""
    import runpy

    kills = runpy.run_path(str(Path(shipped.folder("benchmarks")) / "kills.py"))
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, reward, seconds in ((one, 1.0, 3), (other, 1.0 + 2**-20, 4)):
        (folder / "parts").mkdir(parents=True)
        (folder / "result.json").write_text(f'{{"cost": {{"seconds": {seconds}}}, "reward": {reward}}}')
        (folder / "metrics.jsonl").write_text(f'{{"seconds": {seconds}, "loss": 2}}\n')
    (other / ".x.tmp").touch()
    found = kills["differences"](kills["contents"](one), kills["contents"](other))
    assert found == [".x.tmp is left over", "result.json differs"]
