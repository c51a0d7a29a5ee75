"""The site builds without a warning, and its reference has every public name."""

from __future__ import annotations

import re
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
    for file in ("index.html", "concepts/index.html", "changelog/index.html", "tutorials/steer/index.html"):
        html = (tmp_path / file).read_text()
        assert "../docs/" not in html and 'src="docs/' not in html
    assert (tmp_path / "hearts.png").is_file()
    for name in re.findall(r'src="\.\./([\w-]+\.png)"', (tmp_path / "tutorials" / "steer" / "index.html").read_text()):
        assert (tmp_path / "tutorials" / name).read_bytes()[1:4] == b"PNG"
    for notebook in (ROOT / "docs" / "tutorials").glob("*.ipynb"):
        assert (tmp_path / "tutorials" / notebook.stem / "index.html").is_file()
        assert (tmp_path / "tutorials" / notebook.name).is_file()  # to download
