"""The site builds without a warning, and its reference has every public name."""

from __future__ import annotations

from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import steerfm

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_documents_every_public_name(tmp_path):
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))  # strict: a warning ends it
    page = (tmp_path / "reference" / "index.html").read_text()
    names = [name for name in steerfm.__all__ if f'id="steerfm.{name}"' not in page]
    assert names == []
    for file in ("index.html", "concepts/index.html", "changelog/index.html"):
        html = (tmp_path / file).read_text()
        assert "../docs/" not in html and 'src="docs/' not in html
    assert (tmp_path / "hearts.png").is_file()
