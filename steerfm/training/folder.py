"""A folder of pictures as a data set: class folders, captions, or pictures alone.

| what the folder holds | what a map of it is asked for |
| --- | --- |
| ``cats/a.png``, ``dogs/b.jpg``: a folder for each class (torchvision's ImageFolder) | a class |
| ``a.png``, ``b.jpg`` and ``metadata.jsonl`` with file_name and text (Hugging Face's imagefolder) | words |
| ``a.png``, ``a.txt``, ``b.jpg``, ``b.txt``: a caption beside each picture | words |
| ``a.png``, ``b.jpg`` | nothing |
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from steerfm import files
from steerfm.randomness import stream
from steerfm.training.data import endless, epoch_rows, shift
from steerfm.trust import nearest

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
"""Of files that are read as pictures; of a moving one, the first frame."""
METADATA = "metadata.jsonl"
GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of one channel."""
FITS = {"crop": ImageOps.fit, "pad": partial(ImageOps.pad, color="white")}
"""How a picture of another shape is brought to ``size``: its middle is cut out, or white is put around it."""
ASKED = 10
"""Classes or captions, at most, in the grids of samples that a training draws."""


class FolderData(L.LightningDataModule):
    """A folder of pictures: batches (pictures in [0, 1], labels (b,)), or (pictures, captions, numbers of the captions (b,)).

    Pictures are turned upright as their EXIF says, put on white where they are transparent, brought to 8 bits and to ``size``,
    and held in memory, one byte a channel. Those that are held out are the same however many are added: what a picture shows
    decides. Copies of a picture, its mirror image among them, are all trained on or all held out.

    Args:
        batch_size: rows per training batch.
        root: the folder.
        augment: pixels of random shift, repeating the border.
        seed: of the batches.
        size: side of the pictures in pixels, or [height, width].
        channels: 1 makes all of them grey, 3 all of them colour; None for what they are, where all are alike.
        fit: where a picture is not as wide as ``size``: crop cuts out its middle, pad puts white around it.
        flip: mirror half of the pictures of a batch.
        held_out: share of the pictures that no step trains on, for validation; at least one, and never all of a class.
        licence: of the pictures, for the model's card.

    Attributes:
        shape, class_names, asked, train, test: after `setup`; the last two are pictures (n, c, h, w) uint8 with labels (n,), or
            None in their place.

    Raises:
        ValueError: naming the argument that cannot be used.
    """

    def __init__(
        self,
        batch_size: int = 64,
        root: str | None = None,
        augment: int = 0,
        seed: int = 0,
        size: int | Sequence[int] = 32,
        channels: int | None = None,
        fit: str = "crop",
        flip: bool = False,
        held_out: float = 0.1,
        licence: str = "",
    ) -> None:
        super().__init__()
        sides = [size, size] if isinstance(size, int) else list(size)
        if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
            raise ValueError(f"size={size}: give a side in pixels, size=32, or height and width, size=[32, 48]")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels={channels}: give 1 for grey or 3 for colour")
        if fit not in FITS:
            raise ValueError(f"fit={fit}{nearest(str(fit), FITS)}: give crop or pad")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out}: give a share above 0 and below 1, held_out=0.1")
        if augment < 0 or batch_size < 1:
            raise ValueError(f"augment={augment}, batch_size={batch_size}: give 0 pixels or more, and one picture or more")
        self.batch_size, self.root, self.augment, self.seed = batch_size, root, augment, seed
        self.size, self.channels, self.fit, self.flip = (sides[0], sides[1]), channels, fit, flip
        self.held_out = held_out
        self.licence = licence or "not given"
        self.class_names: tuple[str, ...] = ()
        self.asked: tuple[str, ...] = ()
        self.ready = False

    def setup(self, stage: str | None = None) -> None:
        """Read all pictures.

        Raises:
            FileNotFoundError: no such folder. ValueError: what is wrong with what it holds, and the file.
        """
        self._load()
        trained, held = len(self.train[0]), len(self.test[0])
        if self.batch_size > trained:
            raise ValueError(
                f"batch_size={self.batch_size}: {self.root} has {trained + held} pictures, {held} of them held out: "
                f"batch_size={trained} at most"
            )

    def _load(self) -> None:
        if self.ready:  # the trainer asks again
            return
        listing = listed(self.root)
        pictures = self._read(listing)
        held = torch.tensor(held_out(pictures, listing.labels, self.held_out))
        rows = {True: held.nonzero().flatten(), False: (~held).nonzero().flatten()}
        if not len(rows[True]):
            raise ValueError(f"{self.root}: none of {len(held)} pictures can be held out for validation: add some that differ")
        labels = torch.tensor(listing.labels) if listing.class_names else None
        self.train, self.test = (
            (pictures[rows[side]], None if labels is None else labels[rows[side]]) for side in (False, True)
        )
        self.captions_of = (
            {side: [listing.captions[row] for row in rows[side].tolist()] for side in rows} if listing.captions else {}
        )
        self.numbers = {text: number for number, text in enumerate(dict.fromkeys(listing.captions))}
        self.shape, self.class_names = tuple(pictures.shape[1:]), listing.class_names
        self.asked = (listing.class_names or tuple(dict.fromkeys(self.captions_of.get(True, ()))))[:ASKED]
        self.ready = True

    def _read(self, listing: Listing) -> Tensor:
        """All pictures, (n, c, h, w) uint8."""
        read = partial(read_picture, size=self.size, channels=self.channels, fit=self.fit)
        pool = ThreadPoolExecutor()
        try:
            arrays = list(pool.map(read, listing.files))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the others are not read
        first = {len(array): path for array, path in zip(arrays[::-1], listing.files[::-1])}
        if len(first) > 1:
            raise ValueError(
                f"{self.root} holds grey pictures ({first[1].name}) and colour ones ({first[3].name}): channels=1 or "
                "channels=3 makes them alike"
            )
        return torch.from_numpy(np.stack(arrays))

    # --- batches -----------------------------------------------------------------------------------------------------
    def train_dataloader(self) -> DataLoader:
        return endless(self, self.batch, shared=False)

    def batch(self, number: int) -> tuple[Any, ...]:
        """The batch of a number: of an update, or of an update and a rank."""
        rows = epoch_rows(len(self.train[0]), self.batch_size, self.seed, number)
        pictures, *said = self._rows(rows, held=False)
        generator = stream(self.seed, "data", number)
        if self.augment:
            pictures = shift(pictures, self.augment, generator)
        if self.flip:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            pictures = torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(3), pictures)
        return pictures, *said

    def val_dataloader(self) -> DataLoader:
        parts: Any = torch.arange(len(self.test[0])).split(self.batch_size)
        read: Any = partial(self._rows, held=True)
        return DataLoader(parts, batch_size=None, collate_fn=read, generator=torch.Generator())

    def _rows(self, rows: Tensor, held: bool) -> tuple[Any, ...]:
        """Some of the pictures that are trained on, or of those that are held out, with what they are asked for by."""
        pictures, labels = self.test if held else self.train
        some = pictures[rows].float() / 255
        if labels is not None:
            return some, labels[rows]
        if not self.captions_of:
            return some, [""] * len(rows)
        texts = [self.captions_of[held][row] for row in rows.tolist()]
        return some, texts, torch.tensor([self.numbers[text] for text in texts])

    def captions(self, n: int, generator: torch.Generator) -> list[str]:
        """Captions of n pictures that are trained on, drawn at random."""
        known = self.captions_of[False]
        return [known[row] for row in torch.randint(len(known), (n,), generator=generator).tolist()]

    # --- for whoever measures a map of it ----------------------------------------------------------------------------
    def reference(self) -> Tensor:
        """The pictures that are held out, (m, c, h, w) in [0, 1]."""
        self._load()
        return self.test[0].float() / 255

    def prompts(self, held_out: bool) -> list[str]:
        """The captions of the pictures that are held out, or of the others, each once; none where there are none."""
        self._load()
        return list(dict.fromkeys(self.captions_of.get(held_out, ())))

    def folder(self) -> Path:
        """Where features of the held-out pictures may be kept: not among the pictures."""
        self._load()
        return files.data_root() / "folder" / _digest(self.test[0].numpy().tobytes())[:16]

    def spec(self) -> dict[str, Any]:
        """How to read these pictures again, for the card of a model; see `steerfm.zoo.pictured`."""
        shown = {"size": list(self.size), "channels": self.shape[0], "fit": self.fit, "held_out": self.held_out}
        return {"name": "folder", "root": str(self.root), **shown}

    def digest(self) -> str:
        """Of the pictures that are trained on and of what is said of them."""
        pictures, labels = self.train
        said = labels.tolist() if labels is not None else self.captions_of.get(False, [])
        return _digest(pictures.numpy().tobytes(), json.dumps([self.class_names, said]).encode())

    @staticmethod
    def prepare(root: str | None, size: int, tick: Callable[[int, int], None]) -> tuple[list[list[str]], list[str]]:
        """Read the folder. Returns a table of what it holds, its header first, and lines that say the rest."""
        data = FolderData(1, root, size=size)
        data.setup()
        sides = {"trained on": data.train, "held out": data.test}
        table = [["class", *sides]] if data.class_names else []
        for label, name in enumerate(data.class_names):
            table.append([name, *(str(int((labels == label).sum())) for _, labels in sides.values())])
        counts = ", ".join(f"{len(pictures):,} {side}" for side, (pictures, _) in sides.items())
        words = f"{len(data.numbers):,} captions" if data.captions_of else f"{len(data.class_names)} classes"
        return table, [f"{root}: pictures of shape {list(data.shape)}: {counts}; {words}"]


# --- what there is ---------------------------------------------------------------------------------------------------
@dataclass
class Listing:
    """The pictures of a folder, by name; none is open yet.

    Attributes:
        files: in order of their paths.
        labels: the class of each, or zeros.
        class_names: () where there are no class folders.
        captions: of each; [] where there are none.
    """

    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]
    captions: list[str]


def listed(root: str | Path | None) -> Listing:
    """What a folder holds.

    Raises:
        FileNotFoundError: no such folder. ValueError: it holds nothing, or what fits no form of `steerfm.training.folder`.
    """
    if not root:
        raise ValueError("no folder is named: root=pictures/ names the folder of your pictures")
    folder = Path(root)
    if folder.is_file():
        raise ValueError(f"root={root} is a file: name the folder that it is in")
    if not folder.is_dir():
        raise FileNotFoundError(f"root={root}: no such folder: root= names the folder of your pictures")
    paths = sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())
    pictures = [path for path in paths if path.suffix.lower() in ENDINGS]
    if not pictures:
        raise ValueError(f"root={root}: no pictures in it: files that end in {', '.join(ENDINGS)}")
    names = {path: path.relative_to(folder).parts[0] for path in pictures if path.parent != folder}
    texts = _captions(folder, paths, set(pictures))
    if texts and names:
        raise ValueError(
            f"{root} holds class folders ({next(iter(names.values()))}) and captions ({_named(folder, texts)}): move one of "
            "them away: a map is asked for classes or in words"
        )
    known = {*pictures, *texts}
    strange = [path for path in paths if path not in known and not (path.parent == folder and _is_note(path))]
    if strange:
        raise ValueError(f"{strange[0]} is no picture: move it away; pictures end in {', '.join(ENDINGS)}")
    if texts:
        return Listing(pictures, [0] * len(pictures), (), _matched(folder, texts, pictures))
    if not names:
        return Listing(pictures, [0] * len(pictures), (), [])
    beside = [path for path in pictures if path not in names]
    if beside:
        raise ValueError(f"{beside[0]} lies beside class folders: move it into one of them")
    return Listing(pictures, *_classes(folder, [names[path] for path in pictures]), [])


def _walk(folder: Path) -> Iterable[Path]:
    """All files, but for those that systems leave behind."""
    for place, inside, names in os.walk(folder, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith((".", "__MACOSX"))]
        yield from (
            Path(place, name) for name in names if not name.startswith(".") and name not in ("Thumbs.db", "desktop.ini")
        )


def _is_note(path: Path) -> bool:
    return path.name.lower().startswith(("readme", "license", "licence", "credits"))


def _classes(folder: Path, names: list[str]) -> tuple[list[int], tuple[str, ...]]:
    """The label of each picture by the name of its folder, and the names in order."""
    known = sorted(set(names))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "__MACOSX")) and path.name not in known:
            raise ValueError(f"{path} is a class folder without pictures: fill it, or delete it")
    lowered = [name.strip().lower() for name in known]
    twice = [name for name, lower in zip(known, lowered) if lowered.count(lower) > 1]
    if twice:
        raise ValueError(f"{folder} holds classes of one name, {' and '.join(twice)}: rename one of them")
    return [known.index(name) for name in names], tuple(known)


# --- captions --------------------------------------------------------------------------------------------------------
def _captions(folder: Path, paths: list[Path], pictures: set[Path]) -> list[Path]:
    """The files of the captions: metadata.jsonl, or texts beside pictures."""
    metadata = [path for path in paths if path.name == METADATA]
    if metadata:
        return metadata
    stems = {path.with_suffix("") for path in pictures}
    return [path for path in paths if path.suffix.lower() == ".txt" and path.with_suffix("") in stems]


def _named(folder: Path, texts: list[Path]) -> str:
    return texts[0].relative_to(folder).as_posix()


def _matched(folder: Path, texts: list[Path], pictures: list[Path]) -> list[str]:
    """The caption of each picture.

    Raises:
        ValueError: naming a picture without one, a caption without a picture, or a file that cannot be read.
    """
    if texts[0].name == METADATA:
        known, where = _metadata(texts[0], set(pictures)), METADATA
    else:
        of = {path.with_suffix(""): " ".join(_text(path).split()) for path in texts}
        known, where = {path: of.get(path.with_suffix(""), "") for path in pictures}, ".txt beside it"
    missing = [path.name for path in pictures if not known.get(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder}: no caption for {missing[0]}{more}: write it into {where}, or move the picture away")
    return [known[path] for path in pictures]


def _metadata(file: Path, pictures: set[Path]) -> dict[Path, str]:
    known: dict[Path, str] = {}
    form = '{"file_name": "a.png", "text": "a red heart"}'
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if not isinstance(told, dict) or not all(isinstance(told.get(key), str) for key in ("file_name", "text")):
            raise ValueError(f"{file}, line {number}: not of the form {form}")
        path = file.parent / told["file_name"]
        if path not in pictures:
            raise ValueError(f"{file}, line {number}: no picture {told['file_name']} in this folder: delete the line")
        if path in known:
            raise ValueError(f"{file}, line {number}: a second caption of {told['file_name']}: delete one of them")
        known[path] = " ".join(told["text"].split())
    return known


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8: save it as UTF-8") from None


# --- pictures --------------------------------------------------------------------------------------------------------
def read_picture(path: Path, size: tuple[int, int], channels: int | None, fit: str) -> np.ndarray:
    """A file's picture, upright and on white, as (c, height, width) uint8.

    Args:
        path: of the file.
        size: height and width.
        channels: 1 or 3; None for those that it has.
        fit: a name of `FITS`.

    Raises:
        ValueError: naming the file.
    """
    try:
        with Image.open(path) as file:
            picture = _eight_bits(ImageOps.exif_transpose(file))
    except Exception as error:  # whatever a torn file makes of it
        reason = "it is torn, or something else" if isinstance(error, OSError) else " ".join(str(error).split())[:80]
        raise ValueError(f"{path} is no picture that can be read ({reason}): save it anew, or move it away") from None
    mode = {None: picture.mode, 1: "L", 3: "RGB"}[channels]
    array = np.asarray(FITS[fit](picture.convert(mode), size[::-1], method=Image.Resampling.LANCZOS))
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A picture as L or RGB, with white behind what is transparent."""
    grey = picture.mode in GREY
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        values = np.asarray(picture).astype(np.float64)
        if values.min() < 0 or values.max() > 2**16 - 1:
            raise ValueError("its numbers are beyond 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its numbers are not whole: 8 or 16 bits are read")
    if "transparency" in picture.info or picture.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture.convert("L" if grey else "RGB")


# --- the part that is held out ---------------------------------------------------------------------------------------
def held_out(pictures: Tensor, labels: Sequence[int], share: float) -> list[bool]:
    """Which pictures (n, c, h, w) no step trains on: by what they show, whatever their names and however many there are.

    A picture, its copies and its mirror images are on the same side. One at least is held out where that leaves every class
    some; none otherwise.
    """
    keys = [_digest(min(picture.tobytes(), picture[:, :, ::-1].tobytes())) for picture in pictures.numpy()]
    groups: dict[int, set[str]] = {}
    for key, label in zip(keys, labels):
        groups.setdefault(label, set()).add(key)
    held = {key for key in keys if int(key[:16], 16) < share * 2**64}
    for group in groups.values():
        if group <= held:
            held -= group
    if not held:
        held = set(next(([key] for key in sorted(set(keys)) if not any(group <= {key} for group in groups.values())), []))
    return [key in held for key in keys]


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
