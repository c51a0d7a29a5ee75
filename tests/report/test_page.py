"""report.html and model cards."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest
import torch
import yaml

from steerfm.cost import Cost
from steerfm.report.card import model_card
from steerfm.report.page import report
from steerfm.report.palette import look
from steerfm.report.pictures import picture_grid
from steerfm.report.run_folder import RunFolder


class Balanced(HTMLParser):
    """Collects tags and attributes, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_escaped_page(tmp_path):
    evil = "<script>alert('x')</script> & $body"
    run = RunFolder(tmp_path, yaml.safe_dump({"prompt": evil}))
    picture_grid(torch.rand(1, 2, 1, 8, 8), tmp_path / "grid.png")
    tables = [(evil, ["name", evil], [[evil, 0.123456], ["b", 1234567], ["c", math.nan], ["d", Cost(forwards=2)]])]
    facts = {"command": evil, evil: evil, "mean reward": torch.tensor(1 / 3), "many": [1, 2.5]}
    path = report(run, evil, facts, tables, [(evil, "grid.png"), ("by its whole path", tmp_path / "grid.png")])
    text = path.read_text()
    page = Balanced()
    page.feed(text)
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert "script" not in tags and "link" not in tags and tags.count("img") == 2
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.found if tag == "img")
    assert "http" not in text and "prefers-color-scheme: dark" in text
    assert all(piece in text for piece in ("0.3333", "0.1235", "1,234,567", "1, 2.5", "Configuration"))
    with pytest.raises(FileNotFoundError):
        report(run, "title", {}, pictures=[("missing", "missing.png")])


def test_model_card(tmp_path):
    card = {
        "description": "A flow map.",
        "data": "Fashion-MNIST",
        "licence": "MIT (Zalando SE)",
        "recipe": {"steps": 40000, "ema": 0.999},
        "command": "steerfm train --config fashion",
        "metrics": {"Fréchet distance, 4 jumps": 3.14159, "a|b": "x|y"},
        "parameters": 1234567,
    }
    text = model_card("fashion", card)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "steerfm"
    pieces = "# fashion", "```bash\nsteerfm train", "| Fréchet distance, 4 jumps | 3.142 |", "x\\|y", "1,234,567"
    assert all(piece in text for piece in pieces)
    assert text.index("## Data") < text.index("## Licence") < text.index("## Metrics") < text.index("## Parameters")
    assert yaml.safe_load(model_card("x", {"licence": "house rules"}).split("---")[1])["license"] == "other"
    assert "a\\|b" in text


def test_figures_stand_in_one_line_on_the_right(tmp_path):
    header = ["", "mean", "over base", "95%", "what"]
    rows = [["funnel", 1.5, "-0.014±0.051", "0.33 to 0.4", "a text"], ["mine", -2, "", "-1 to 3", "12 monkeys"]]
    text = report(tmp_path, "title", {}, [("a table", header, rows)]).read_text()
    assert text.count("<td class=number>") == 6 and text.count("<th class=number>") == 3
    assert "<th>what</th>" in text and "<td>12 monkeys</td>" in text


def test_a_row_has_the_colour_of_its_method(tmp_path):
    names = ["funnel *", "base, 4 jumps", "fmrg_j", "my own"]
    text = report(tmp_path, "title", {}, [("a table", ["method", "reward"], [[name, 1.0] for name in names])]).read_text()
    for name in names[:3]:
        assert f'<i style="background:{look(name.removesuffix(" *")).colour}"></i>{name}<' in text
    assert "<td>my own</td>" in text
