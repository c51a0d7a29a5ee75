"""Models, data sets and encoders of installed plug-ins, by entry point; nothing is imported before it is used.

[project.entry-points."steerfm.models"]
mine = "my_package.models"             # a package with the files of the models in its folder: mine.json, mine.safetensors
[project.entry-points."steerfm.data"]
mine = "my_package.data:MyData"        # a LightningDataModule, see CONTRIBUTING
[project.entry-points."steerfm.encoders"]
mine = "my_package.encoders:Mine"      # a class with encode_text, for maps of words: text=mine
image_text_head = "..."                # the class of files of that kind: a trained head between frozen towers
tf_efficientnet_lite1 = "..."          # by timm's name: a function that returns the network with trained weights
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

MODELS, DATA, ENCODERS = "steerfm.models", "steerfm.data", "steerfm.encoders"
FOLDER = EntryPoint("folder", "steerfm.training.folder:FolderData", DATA)
"""The built-in data set: a folder of pictures."""


@cache
def folders() -> tuple[Path, ...]:
    """The folders with the models of plug-ins."""
    places: dict[Path, None] = {}
    for point in sorted(entry_points(group=MODELS), key=lambda point: point.name):
        try:
            spec = importlib.util.find_spec(point.value)
        except ImportError:  # the package is gone
            continue
        places |= dict.fromkeys(Path(place) for place in (spec and spec.submodule_search_locations) or ())
    return tuple(places)


def models() -> dict[str, Path]:
    """The JSON files of all models in plug-ins, by name."""
    files = [file for folder in folders() for file in folder.glob("*.json")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def model_folder(name: str) -> Path | None:
    """The folder of a model that consists of several files, as those of open_clip; None if no plug-in has it."""
    return next((folder / name for folder in folders() if (folder / name).is_dir()), None) if Path(name).name == name else None


def by_name(group: str, *more: EntryPoint) -> dict[str, EntryPoint]:
    """The entry points of a group, and ``more`` built-in ones, in the order of their names; nothing is imported."""
    return {point.name: point for point in sorted([*more, *entry_points(group=group)], key=lambda point: point.name)}


def data_sets() -> dict[str, EntryPoint]:
    """Data sets by name."""
    return by_name(DATA, FOLDER)


def encoders() -> dict[str, EntryPoint]:
    """Encoders by name."""
    return by_name(ENCODERS)


def image_text_head() -> Any:
    """The class of image-text scorers, a trained head between frozen towers.

    Raises:
        ImportError: no plug-in has it.
    """
    point = encoders().get("image_text_head")
    if point is None:
        raise ImportError("image-text heads come with steerfm_rewards: pip install steerfm")
    return point.load()
