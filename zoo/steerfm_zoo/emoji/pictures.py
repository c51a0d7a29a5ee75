"""Captioned colour pictures: emoji in three styles, read from the npm packages that carry them.

>>> data = pictures.prepare("runs/data")            # once: downloads packs with npm, puts pictures on white and resizes them
>>> data.pictures, data.concept, data.captions(torch.arange(8), generator)

A *concept* is the meaning of an emoji, whatever its style or skin tone. The split is by concept, so no style of a held-out
concept is used in training. An epoch contains every concept once per style, because skin tones are variants of one picture.
Flags are left out: their captions name places, not what the picture shows.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from steerfm.files import data_root, where_set, write, write_tensors

PACKS = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/", "Apache-2.0 (Noto Emoji, Google)"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/", "CC-BY-4.0 (Twemoji, Twitter and contributors)"),
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/", "MIT (Fluent Emoji, Microsoft)"),
}
"""Styles: package, folder of the pictures, licence of the pictures."""
WORDS = "emojilib@4.0.3"
LICENCE = (
    "; ".join(f"{style}: {licence}" for style, (_, _, licence) in PACKS.items()) + "; captions: MIT (emojilib, emoji-data)"
)
STYLES = tuple(PACKS)
TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark",
}  # fmt: skip
HELD_OUT = 200


@dataclass
class Emoji:
    """Prepared pictures with their captions.

    Attributes:
        pictures: (n, 3, size, size) uint8, on white.
        concept: (n,) int64, index of the concept.
        style: (n,) int64, index in `STYLES`.
        tone: (n,) int64, 0 for none, else 1 + index in `TONES`.
        names: name of each concept.
        keywords: keywords of each concept, without its name.
        held_out: (concepts,) bool, whether a concept is held out.
    """

    pictures: Tensor
    concept: Tensor
    style: Tensor
    tone: Tensor
    names: list[str]
    keywords: list[list[str]]
    held_out: Tensor

    def groups(self, held_out: bool) -> list[Tensor]:
        """Group row numbers by (concept, style), with all skin tones in one group. An epoch takes one row of each."""
        rows: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self.concept.tolist(), self.style.tolist())):
            if bool(self.held_out[key[0]]) == held_out:
                rows.setdefault(key, []).append(row)
        return [torch.tensor(group) for group in rows.values()]

    def caption(self, row: int) -> str:
        """Return the plain caption of a picture: the name of its concept, and its skin tone if it has one."""
        tone = int(self.tone[row])
        return self.names[int(self.concept[row])] + (f", {list(TONES.values())[tone - 1]} skin tone" if tone else "")

    def captions(self, rows: Tensor, generator: torch.Generator) -> list[str]:
        """Draw a caption for each picture: its name (one half), its name with one or two keywords, or only keywords (a fifth).

        A third of the captions also name the style.
        """
        texts = []
        for row, draw in zip(rows.tolist(), torch.rand(len(rows), 4, generator=generator).tolist()):
            words = self.keywords[int(self.concept[row])]
            first = int(draw[1] * len(words)) if words else 0
            some = [words[(first + k) % len(words)] for k in range(min(len(words), 1 + (draw[2] < 0.5)))]
            text = self.caption(row)
            if words and draw[0] > 0.5:
                text = ", ".join(some if draw[0] > 0.8 else [text, *some])
            texts.append(text + (f", {STYLES[int(self.style[row])]} style" if draw[3] < 1 / 3 else ""))
        return texts


def data_folder(root: str | Path | None = None) -> Path:
    """Return the folder of the pictures: ``emoji`` in `data_root`."""
    return data_root(root) / "emoji"


def load(root: str | Path | None = None, size: int = 32) -> Emoji:
    """Load the pictures that `prepare` wrote.

    Raises:
        FileNotFoundError: they are missing. The message names the command that prepares them.
    """
    file = data_folder(root) / f"emoji-{size}.safetensors"
    if not file.is_file():
        command = "steerfm data emoji" + ("" if size == 32 else f" --size {size}")
        raise FileNotFoundError(
            f"no emoji pictures of {size} px in {file.parent}: run '{command}' (it fetches four npm packages){where_set(root)}"
        )
    with safe_open(file, "pt") as tensors:
        words = json.loads(tensors.metadata()["words"])
        columns = {name: tensors.get_tensor(name) for name in ("pictures", "concept", "style", "tone")}
    names = words["names"]
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(words["code_points"][i].encode()).hexdigest())
    held_out = torch.zeros(len(names), dtype=torch.bool)
    held_out[order[:HELD_OUT]] = True
    rest = {name: columns[name].long() for name in ("concept", "style", "tone")}
    return Emoji(columns["pictures"], **rest, names=names, keywords=words["keywords"], held_out=held_out)


def prepare(
    root: str | Path | None = None, size: int = 32, tick: Callable[[int, int], None] = lambda done, total: None
) -> Emoji:
    """Download missing packs, and write ``emoji-<size>.safetensors`` and ``credits.json`` in `data_folder`.

    Args:
        root: as for `data_folder`.
        size: side of the pictures, in pixels, from 8 to 64.
        tick: called with (done, total) pictures.

    Raises:
        FileNotFoundError: a pack is missing and npm cannot download it.
        ValueError: ``size`` is out of range, or a pack is incomplete.
    """
    if not 8 <= size <= 64:
        raise ValueError(f"size={size}: give 8 to 64, the pictures have 64 pixels")
    folder = data_folder(root)
    packs = {style: _pack(package, folder) for style, (package, _, _) in PACKS.items()}
    with tarfile.open(packs["noto"]) as archive:
        entries = json.loads(_member(archive, "package/emoji.json"))
    with tarfile.open(_pack(WORDS, folder)) as archive:
        words = json.loads(_member(archive, "package/dist/emoji-en-US.json"))
    entries = [e for e in entries if e["category"] not in ("Flags", "Component")]
    names, keywords = [], []
    for entry in entries:
        character = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        labels = words.get(character) or words.get(character.replace("\ufe0f", "")) or [entry["short_name"]]
        name = labels[0].replace("_", " ").strip()
        names.append(name if name not in ("keycap", *names) else entry["short_name"].replace("_", " ").replace("-", " "))
        keywords.append([w.replace("_", " ") for w in labels[1:] if any(c.isalpha() for c in w) and ":" not in w])
    columns: dict[str, list[int]] = {"concept": [], "style": [], "tone": []}
    pictures = []
    for style, archive_path in enumerate(packs.values()):
        files = _pictures(archive_path, PACKS[STYLES[style]][1])
        for concept, entry in enumerate(entries):
            tones = {code: v["unified"] for code, v in entry.get("skin_variations", {}).items() if code in TONES}
            for tone, code_points in enumerate([entry["unified"], *(tones.get(code) for code in TONES)]):
                raw = code_points and next((files[key] for key in _keys(code_points) if key in files), None)
                if raw:
                    pictures.append(_picture(raw, size))
                    for column, value in zip(columns.values(), (concept, style, tone)):
                        column.append(value)
            tick(style * len(entries) + concept + 1, len(packs) * len(entries))
        count = columns["style"].count(style)
        if count < 0.8 * len(entries):
            raise ValueError(f"{archive_path} holds {count} of {len(entries)} pictures: delete it and run this again")
    tensors = {name: torch.tensor(value, dtype=torch.int16) for name, value in columns.items()}
    texts = {"names": names, "keywords": keywords, "code_points": [entry["unified"] for entry in entries]}
    file = folder / f"emoji-{size}.safetensors"
    write_tensors(file, tensors | {"pictures": torch.stack(pictures)}, {"words": json.dumps(texts)})
    credit = {style: {"package": package, "licence": licence} for style, (package, _, licence) in PACKS.items()}
    credit["captions"] = {"package": WORDS, "licence": "MIT"}
    write(folder / "credits.json", json.dumps(credit, indent=2) + "\n")
    return load(root, size)


def _pack(package: str, folder: Path) -> Path:
    """Return the path of a package's archive; download it if it is missing."""
    name, _, version = package.rpartition("@")
    file = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        process = npm and subprocess.run([npm, "pack", package], cwd=folder, capture_output=True, text=True, check=False)
        if not process or process.returncode or not file.is_file():
            why = "npm is not installed" if not process else (process.stderr.strip().splitlines() or ["npm failed"])[-1]
            raise FileNotFoundError(f"cannot fetch {package} ({why}): put the file of 'npm pack {package}' into {folder}")
    return file


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{archive.name} has no {name}: delete it and run this again")
    return member.read()


def _pictures(path: Path, folder: str) -> dict[str, bytes]:
    """Return the picture files of a pack by their code points."""

    def each() -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() and member.name.startswith(folder) else None
                if file is not None:
                    yield Path(member.name).stem, file.read()

    return dict(each())


def _keys(code_points: str) -> list[str]:
    """Return the spellings of a sequence of code points in the file names of the packs."""
    codes = [code_points.lower(), code_points.lower().replace("-fe0f", "")]
    return [*codes, *("-".join(part.lstrip("0") for part in code.split("-")) for code in codes)]


def _picture(raw: bytes, size: int) -> Tensor:
    """Decode a picture, put it on white, and resize it to (3, size, size) uint8."""
    from PIL import Image

    picture = Image.open(io.BytesIO(raw)).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    shrunk = white.convert("RGB").resize(
        (size, size), Image.Resampling.BOX if picture.width % size == 0 else Image.Resampling.LANCZOS
    )
    return torch.from_numpy(np.asarray(shrunk).copy()).permute(2, 0, 1)
