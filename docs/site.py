"""Pages of the site that no markdown in docs/ holds: the README, pages of the project, the notebooks with their pictures, and
the reference of the public names.

A hook of mkdocs (mkdocs.yml).
"""

from __future__ import annotations

import ast
import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PROJECT = {"README.md": "index.md"} | {f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")}
"""Files beside docs/, and their pages."""
SECTIONS = {
    "Maps": ("flowmap", "models.network", "interpolant", "closed_form", "zoo"),
    "Rewards": ("rewards",),
    "Sampling and steering": ("sampling", "steering", "transitions", "cost"),
}
"""Headings of the reference, and the modules whose public names stand below them."""
NOTEBOOKS = sorted(Path(__file__).parent.glob("tutorials/*.ipynb"))


def on_files(files: Files, config: Any) -> Files:
    for name, page in PROJECT.items():
        files.append(File.generated(config, page, content=moved((ROOT / name).read_text())))
    files.append(File.generated(config, "CITATION.cff", content=(ROOT / "CITATION.cff").read_text()))
    files.append(File.generated(config, "reference.md", content=reference()))
    for path in NOTEBOOKS:
        name = f"{path.parent.name}/{path.stem}"
        text, pictures = notebook(path)
        files.append(File.generated(config, f"{name}.md", content=text))
        for number, picture in enumerate(pictures):
            files.append(File.generated(config, f"{name}-{number}.png", content=picture))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the files beside docs/, and to notebooks, lead to their pages."""
    for path in NOTEBOOKS:
        markdown = markdown.replace(f"{path.name})", f"{path.stem}.md)")
    for name, page in PROJECT.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown


def moved(text: str) -> str:
    """The text of a file beside docs/, with links that hold inside it."""
    text = text.replace("](docs/", "](")
    for name, page in PROJECT.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text


def notebook(path: Path) -> tuple[str, list[bytes]]:
    """A notebook as it was run: its page, and its pictures as pngs, which the page calls NAME-0.png, NAME-1.png, ...

    What a picture shows is the cell's ``metadata.alt``.
    """
    text, pictures = [], []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text.append(source)
            continue
        text.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                text.append(f"![{cell['metadata']['alt']}]({path.stem}-{len(pictures)}.png)")
                pictures.append(base64.b64decode("".join(data["image/png"])))
            else:
                shown = "".join(output.get("text") or data["text/plain"])
                text.append(f"```text\n{shown.rstrip()}\n```")
    text.append(f'<a href="../{path.name}" download>Download this page as a notebook</a>')
    return "\n\n".join(text), pictures


def reference() -> str:
    """A page of all public names, by the stub that lists them."""
    stub = ast.parse((ROOT / "steerfm" / "__init__.pyi").read_text())
    names: dict[str, list[str]] = {}
    for line in stub.body:
        if isinstance(line, ast.ImportFrom) and line.module:
            names.setdefault(line.module.removeprefix("steerfm."), []).extend(alias.name for alias in line.names)
    missing = names.keys() - {module for modules in SECTIONS.values() for module in modules}
    assert not missing, f"docs/site.py: in which section do the names of {missing} stand?"
    conventions = "Conventions: time 0 is noise, 1 is data; pictures at a reward are in [0, 1]; higher is better."
    text = ["# Reference", f"All names of `import steerfm`. {conventions}"]
    for title, modules in SECTIONS.items():
        text.append(f"# {title}")
        text += [f"::: steerfm.{name}" for module in modules for name in names.get(module, [])]
    return "\n\n".join(text)
