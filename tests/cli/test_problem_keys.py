"""Every key of a problem of a suite changes what runs, or is refused."""

import pytest

from steerfm import cli
from steerfm.cli.bench import TAKEN

PROBLEM = "{reward: {name: classifier, target: Shirt}, label: Shirt}"
SUITE = f"problems: {{easy: {PROBLEM}}}\nmethods: {{best_of_n: {{}}}}\nbudgets: [4]\nn: 1\n"


@pytest.mark.parametrize(
    "key", ["seeds=3", "guidance=2", "method=funnel", "out=there", "device=cpu", "lookaheads=true", "force=true"]
)
def test_a_key_that_would_do_nothing_is_refused(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(SUITE)
    assert cli.main(["bench", "mine.yaml", f"problems.easy.{key}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"problems.easy.{key.partition('=')[0]} does nothing" in error
    assert all(name in error for name in TAKEN)
    assert not (tmp_path / "runs").exists()
