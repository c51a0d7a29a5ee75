"""Run the notebooks of docs/tutorials and write their outputs back: `python docs/notebooks.py [NAME ...]`.

Two minutes on two cores. It needs `pip install '.[notebooks]'` in a checkout. Every notebook runs in a new kernel and an empty
folder. What differs from run to run or from machine to machine is left out: times, memory, the colours of a terminal.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent / "tutorials"
VARYING = (
    r"\x1b\[[0-9;?]*[A-Za-z]",  # colours
    r", [\d.]+ s, [\d.]+ [KMG]iB",  # of a cost
    r", seconds [\d.]+",  # of a run
    r"[ \t]+(?=\r?\n)",
)


def run(path: Path) -> None:
    """Run one notebook and write it back."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [tidy(output) for output in joined(cell.outputs) if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    path.write_text(nbformat.writes(notebook) + "\n")
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs in which consecutive pieces of one stream are one."""
    whole: list[NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == "stream" == whole[-1].output_type and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def tidy(output: NotebookNode) -> NotebookNode:
    """An output without what varies; of a picture that is there in two formats, only the png."""
    if output.output_type == "stream":
        output.text = plain(output.text)
    if data := output.get("data"):
        for kind in {"text/html", "image/jpeg"} & data.keys():
            del data[kind]
        if "image/png" in data:
            data["image/png"] = smaller(data["image/png"])
        data["text/plain"] = re.sub(r" at 0x[0-9A-Fa-f]+", "", plain(data.get("text/plain", "")))
    return output


def smaller(picture: str) -> str:
    """A png, in base64, of at most 128 colours."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        buffer, "png", optimize=True
    )
    return min(picture, base64.b64encode(buffer.getvalue()).decode(), key=len)


def plain(text: str) -> str:
    """A text without what varies."""
    for pattern in VARYING:
        text = re.sub(pattern, "", text)
    return text.replace("\r\n", "\n")


if __name__ == "__main__":
    os.environ |= {"COLUMNS": "80", "TTY_COMPATIBLE": "0"}  # of what commands print: its width, and no bars of progress
    for name in sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]:
        run(FOLDER / f"{name}.ipynb")
