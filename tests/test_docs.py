"""The generated parts of the documentation are those of the code."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from steerfm import cli, finetuning
from steerfm.rewards import available, find
from steerfm.steering import METHODS

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = Path(__file__).parent.parent / "configs" / "steer"


@pytest.mark.slow
def test_the_table_of_methods_is_current(capsys):
    assert cli.main(["methods", "--markdown"]) == 0
    table = capsys.readouterr().out.strip()
    assert table in (DOCS / "methods.md").read_text(), "paste the output of `steerfm methods --markdown` into docs/methods.md"


@pytest.mark.slow
def test_the_snippets_of_fine_tuning_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / "finetuning.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "finetuning.md", "exec"), {})
    assert "NeuralFlowMap 8" in capsys.readouterr().out


def test_the_snippets_of_methods_run(capsys):
    exact, steps = re.findall(r"```python\n(.*?)```", (DOCS / "methods.md").read_text(), re.DOTALL)
    exec(compile(exact, "methods.md", "exec"), {})
    log_z, estimate = map(float, capsys.readouterr().out.split())
    assert log_z == pytest.approx(0.756, abs=5e-4) and abs(estimate - log_z) < 0.15
    exec(compile(steps, "methods.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("t = 0.25") and lines[3].endswith("looks like (2, 8, 1, 28, 28)")
    assert lines[4].startswith("3 [0.7")


def test_the_snippets_of_rewards_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / "rewards.md").read_text(), re.DOTALL)
    assert len(snippets) == 5 and all(len(snippet.splitlines()) <= 22 for snippet in snippets)
    for snippet in snippets:
        exec(compile(snippet, "rewards.md", "exec"), {})
    assert "clip + 2 red True frozenset()" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in find("emoji_judge").packages), reason="needs what emoji_judge needs"
)
def test_the_snippet_of_words_draws_its_picture(capsys, tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "emoji.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet.replace("particles=16", "particles=2"), "emoji.md", "exec"), {})
    assert (tmp_path / "emoji.png").is_file() and "'best of 16': 0." in capsys.readouterr().out


def test_every_reward_is_in_the_table_of_rewards():
    text = (DOCS / "rewards.md").read_text()
    assert [name for name in available() if f"| `{name}` |" not in text] == [], "paste the table of `steerfm bench rewards`"


def test_every_fine_tuning_method_has_a_recipe_and_is_explained(capsys):
    for name in finetuning.METHODS:
        assert cli.main(["finetune", "--config", name, "--show"]) == 0
        assert f"name: {name}" in capsys.readouterr().out
        assert cli.main(["methods", name]) == 0
        assert "arguments and defaults" in capsys.readouterr().out


def test_methods_are_listed_and_explained(capsys):
    assert cli.main(["methods"]) == 0
    listed = capsys.readouterr().out
    for name in METHODS:
        assert name in listed
        assert cli.main(["methods", name]) == 0
        out = capsys.readouterr().out
        assert "Samples:" in out and "method.particles" in out
    assert cli.main(["methods", "dass"]) == 2
    assert "did you mean 'das'" in capsys.readouterr().err


def test_every_preset_has_a_recipe_that_can_be_read(capsys):
    for name in METHODS:
        if name != "steering":
            assert cli.main(["steer", "--config", name, "--show"]) == 0
            assert f"name: {name}" in capsys.readouterr().out


def test_benchmarks_are_listed(capsys):
    assert cli.main(["bench"]) == 0
    assert "exact" in capsys.readouterr().out
    assert cli.main(["bench", "exakt"]) == 2
    assert "did you mean 'exact'" in capsys.readouterr().err


def test_the_table_of_what_fits_which_map_is_current(capsys):
    assert cli.main(["models", "--markdown"]) == 0
    table = capsys.readouterr().out.strip()
    assert table in (DOCS / "models.md").read_text(), "paste the output of `steerfm models --markdown` into docs/models.md"


PAGES = [*sorted(DOCS.rglob("*.md")), *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as they are shown on the web."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_links_lead_somewhere_and_pictures_are_described(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for picture, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text):
        assert words, f"{target}: what does it show?"
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        assert there.exists(), target
        assert not anchor or picture or anchor in anchors(there), target
