"""The contract of a data set."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from steerfm.randomness import untouched
from steerfm.testing.contract import ContractError, after_seed, failing, moves_global_state, require

FACTS = {
    "class_names": "names of the labels, in order; () for captions",
    "asked": "labels or prompts for the grids that `train` draws",
    "licence": "the owner and licence of the data",
}


def check_data(module: Any) -> None:
    """Check a data module against the contract of `steerfm train` and `evaluate`.

    Args:
        module: a LightningDataModule; the check sets it up and reads a few batches.

    Raises:
        ContractError: the first violation and its fix, in one sentence.
    """
    with untouched():
        for check in CHECKS:
            check(module, f"data {type(module).__name__!r}")


def setting_up(module: Any, name: str) -> None:
    """It has the methods of a data module, and setup works."""
    for part in ("setup", "train_dataloader", "batch"):
        require(
            callable(getattr(module, part, None)),
            f"{name} has no {part}",
            "derive it from lightning.LightningDataModule, and write batch(number) and train_dataloader",
        )
    with failing(name):
        module.setup("fit")


def batches(module: Any, name: str) -> None:
    """A batch is (pictures in [0, 1], labels or captions, ...), with equal numbers of rows."""
    with failing(name):
        batch = module.batch(0)
    _check_batch(batch, name, "batch(0)")
    x = batch[0]
    size = getattr(module, "batch_size", len(x))
    require(len(x) == size, f"{name} gives a batch of {len(x)} rows for batch_size = {size}", "every batch is whole")


def _check_batch(batch: Any, name: str, where: str) -> None:
    form = "a batch is a tuple (x, labels) or (x, captions, concepts), with x float (b, c, h, w) in [0, 1] or (b, d)"
    parts: list[Any] = list(batch) if isinstance(batch, tuple | list) else []
    require(len(parts) > 1, f"{name} gives a {type(batch).__name__} as {where}", form)
    x, targets = parts[:2]
    require(
        isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 4) and len(x) > 0,
        f"{name} gives {x.dtype if isinstance(x, Tensor) else type(x).__name__} {tuple(getattr(x, 'shape', ()))} in {where}",
        form,
    )
    require(torch.isfinite(x).all(), f"{name} gives NaN or inf in {where}", "leave such rows out")
    if x.ndim == 4:
        require(
            x.min() >= 0 and x.max() <= 1,
            f"{name} gives pictures in [{x.min():.3g}, {x.max():.3g}] in {where}",
            "pictures are in [0, 1]; the model converts them to its own space",
        )
    for part in parts[1:]:
        require(len(part) == len(x), f"{name} gives {len(part)} labels or captions for {len(x)} rows in {where}", form)
    labels = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
    texts = isinstance(targets, list | tuple) and all(isinstance(text, str) for text in targets)
    require(
        labels or texts, f"{name} gives neither labels nor captions in {where}", "the second part is (b,) int64, or b texts"
    )


def facts(module: Any, name: str) -> None:
    """Its shape, class_names and licence are set and correct."""
    x, targets = module.batch(0)[:2]
    if x.ndim != 4:
        return
    shape = getattr(module, "shape", None)
    require(
        tuple(x.shape[1:]) == (None if shape is None else tuple(shape)),
        f"{name} gives pictures {tuple(x.shape[1:])} and says shape = {shape}",
        "shape is that of one picture, (c, h, w)",
    )
    for fact, what in FACTS.items():
        require(hasattr(module, fact), f"{name} has no {fact}", f"set it on the class: {what}")
    if isinstance(targets, Tensor):
        require(
            targets.min() >= 0 and targets.max() < len(module.class_names),
            f"{name} gives labels {targets.min()} to {targets.max()} for {len(module.class_names)} class_names",
            "labels count from 0, and class_names has a name for each",
        )


def repeats(module: Any, name: str) -> None:
    """A batch depends on its number and the seed only, so that a run can be resumed."""
    own = "draw from steerfm.randomness.stream(seed, purpose, number)"
    first, other = after_seed(0, lambda: module.batch(3)), after_seed(1, lambda: module.batch(3))
    require(_same(first, other), f"{name} gives two different batches for one number", own)
    require(not moves_global_state(lambda: module.batch(3)), f"{name} seeds or draws from a global random state", own)
    require(not _same(first, module.batch(4)), f"{name} gives the same batch for every number", own)


def _same(a: Any, b: Any) -> bool:
    parts = zip(a, b, strict=True)
    return all(x.equal(y) if isinstance(x, Tensor) else list(x) == list(y) for x, y in parts)


def loaders(module: Any, name: str) -> None:
    """Training yields batch 0, 1, 2, ... without end; validation yields some held-out batches."""
    with failing(name):
        batches_read = list(islice(iter(module.train_dataloader()), 3))
    fix = "return steerfm.training.data.endless(self, self.batch, shared=False)"
    require(len(batches_read) == 3, f"{name} ends its training after {len(batches_read)} batches", fix)
    for number, batch in enumerate(batches_read):
        require(
            _same(batch, module.batch(number)), f"{name} trains on another batch than batch({number}) at update {number}", fix
        )
    if getattr(module, "shape", None) is None:  # endless toys
        return
    try:
        held_out = list(module.val_dataloader())
    except Exception as error:
        raise ContractError(
            f"{name} has no validation data: write val_dataloader, with pictures that are not in the training data"
        ) from error
    require(held_out, f"{name} has empty validation data", "val_dataloader yields pictures that are not in the training data")
    _check_batch(held_out[0], name, "the first validation batch")


CHECKS = (setting_up, batches, facts, repeats, loaders)
"""The checks of `check_data`, in this order; see their docstrings."""
