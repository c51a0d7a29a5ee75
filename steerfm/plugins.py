"""What installed plug-ins bring, by entry point: files of models, data sets, encoders; nothing is imported before it is used.

[project.entry-points."steerfm.models"]
mine = "my_package.models"             # a package; the files of the models are in its folder: mine.json, mine.safetensors
[project.entry-points."steerfm.data"]
mine = "my_package.data:MyData"        # a LightningDataModule, see CONTRIBUTING
[project.entry-points."steerfm.encoders"]
mine = "my_package.encoders:Mine"      # a class with encode_text, for maps of words: text=mine
image_text_head = "..."                # what files of that kind hold: a trained head between frozen towers
tf_efficientnet_lite1 = "..."          # by timm's name: a function that makes the network with trained weights
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

MODELS, DATA, ENCODERS = "steerfm.models", "steerfm.data", "steerfm.encoders"
FOLDER = EntryPoint("folder", "steerfm.training.folder:FolderData", DATA)
"""The data set that is no plug-in's: a folder of one's own pictures."""


@cache
def folders() -> tuple[Path, ...]:
    """The folders in which plug-ins keep their models."""
    found: dict[Path, None] = {}
    for point in sorted(entry_points(group=MODELS), key=lambda point: point.name):
        try:
            spec = importlib.util.find_spec(point.value)
        except ImportError:  # its package is gone
            continue
        found |= dict.fromkeys(Path(place) for place in (spec and spec.submodule_search_locations) or ())
    return tuple(found)


def models() -> dict[str, Path]:
    """The JSON of every model that a plug-in brings, by name."""
    files = [file for folder in folders() for file in folder.glob("*.json")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def model_folder(name: str) -> Path | None:
    """The folder of a model that is a folder of files, as open_clip's are; None where no plug-in brings it."""
    return next((folder / name for folder in folders() if (folder / name).is_dir()), None) if Path(name).name == name else None


def by_name(group: str, *more: EntryPoint) -> dict[str, EntryPoint]:
    """What plug-ins bring under a group, and what is no plug-in's, in the order of the names; nothing is imported."""
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
        ImportError: no plug-in brings it.
    """
    point = encoders().get("image_text_head")
    if point is None:
        raise ImportError("image-text heads come with steerfm_rewards: pip install steerfm")
    return point.load()
