"""Write report.html, a single self-contained page."""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from steerfm import files
from steerfm.report.formats import short
from steerfm.report.palette import FIXED, NAMES, look, subject
from steerfm.report.run_folder import RunFolder


def report(
    folder: str | Path | RunFolder,
    title: str,
    facts: Mapping[str, Any],
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = (),
    pictures: Sequence[tuple[str, str | Path]] = (),
) -> Path:
    """Write report.html, a single self-contained page that can be sent by mail.

    Args:
        folder: run folder. Its config.yaml, if present, is shown at the end of the page.
        title: heading.
        facts: values by name; ``command`` is shown as code.
        tables: (caption, header, rows) of each table.
        pictures: (caption, path) of each picture. Paths are relative to the folder or to the working directory.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: a picture does not exist.
    """
    folder = Path(folder)
    facts = dict(facts)
    parts = [f"<h1>{_escape(title)}</h1>"]
    if command := facts.pop("command", None):
        parts.append(f"<pre><code>{_escape(command)}</code></pre>")
    if facts:
        rows = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in facts.items())
        parts.append(f"<dl>{rows}</dl>")
    for caption, path in pictures:
        file = folder / path if (folder / path).is_file() else Path(path)
        parts.append(_figure(caption, file))
    parts += [_table(*table) for table in tables]
    if (config := folder / "config.yaml").is_file():
        content = _escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>Configuration</summary><pre><code>{content}</code></pre></details>")
    page = PAGE.substitute(title=_escape(title), style=STYLE, body="\n".join(parts))
    return files.write(folder / "report.html", page.encode())


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --back: #ffffff; --box: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #323f4b; --back: #161b22; --box: #1f2933; }
}
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
pre { background: var(--box); border-radius: 6px; padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 1.25rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.75rem 0; }
figcaption { color: var(--soft); text-align: left; padding-bottom: .4rem; max-width: 44rem; }
img { max-width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
.plot { width: 34rem; }
.grid { min-width: min(27rem, var(--width)); }  /* captions of a wide grid are 11 pixels high at this width: it scrolls */
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
.number { text-align: right; } td.number, td:first-child { white-space: nowrap; }
td i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""


def _figure(caption: str, file: Path) -> str:
    """Return a picture with its caption. A plot is shown no wider than its text needs."""
    data, kind = file.read_bytes(), mimetypes.guess_type(file.name)[0] or "image/png"
    from steerfm.report.style import DPI, WIDTH  # matplotlib is slow to import: only pages with pictures need it

    # bytes 16 to 20 of a png hold its width
    width = int.from_bytes(data[16:20], "big")
    style = 'class="plot"' if width == round(WIDTH * DPI) else f'class="grid" style="--width: {width}px"'
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    image = f'<img {style} src="{source}" alt="{_escape(caption)}">'
    return f'<figure><figcaption>{_escape(caption)}</figcaption><div class="scroll">{image}</div></figure>'


def _table(caption: str, header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table that scrolls if it is wider than the page.

    Columns of numbers are aligned right. A name in the first column has the same colour as in the plots.
    """
    figures = [bool(rows) and all(_is_figure(row[i]) for row in rows) for i in range(len(header))]
    head = "".join(_cell("th", cell, figure) for cell, figure in zip(header, figures))
    body = "".join(
        f"<tr>{''.join(_cell('td', cell, figure, dot=not i) for i, (cell, figure) in enumerate(zip(row, figures)))}</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<figure><figcaption>{_escape(caption)}</figcaption><div class="scroll">{table}</div></figure>'


def _cell(tag: str, cell: Any, figure: bool, dot: bool = False) -> str:
    mark = ""
    if dot and isinstance(cell, str) and subject(name := cell.removesuffix(" *")) in {*NAMES, *FIXED}:
        mark = f'<i style="background:{look(name).colour}"></i>'
    return f"<{tag}{' class=number' if figure else ''}>{mark}{_escape(cell)}</{tag}>"


def _is_figure(cell: Any) -> bool:
    """Whether a cell is a number or a text such as "-0.014±0.051" or "0.3 to 0.4". An empty cell is a missing number."""
    if isinstance(cell, bool):
        return False
    return isinstance(cell, int | float | np.number) or bool(
        re.fullmatch(r"|-|[+-]?[\d.][\d.,]*( ?(±|to) ?[+-]?[\d.,]+)?", str(cell))
    )


def _escape(value: Any) -> str:
    return html.escape(short(value))
