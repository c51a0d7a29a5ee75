"""Captioned emoji as batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from steerfm.randomness import stream
from steerfm.training.data import endless, epoch_rows, shift
from steerfm_zoo.emoji import pictures as source


class EmojiData(L.LightningDataModule):
    """Captioned emoji in three styles (see `pictures`), in batches (pictures (b, 3, h, w) in [0, 1], captions, concepts (b,)).

    An epoch contains each concept once per style, in a random skin tone and with a random caption. Validation uses the held-out
    concepts, once per style, with their plain captions.

    Args:
        batch_size: rows per training batch.
        root: folder of the prepared data, see `pictures.data_folder`.
        augment: largest random shift, in pixels.
        seed: seed of the batches.
        size: side of the pictures, in pixels; 'steerfm data emoji --size' prepares them.
    """

    class_names = ()
    asked = (
        "red heart",
        "grinning face",
        "dog face",
        "pizza",
        "airplane",
        "cactus",
        "blue book",
        "soccer ball",
        "house",
        "woman scientist",
    )
    shape = (3, 32, 32)
    licence = source.LICENCE

    def __init__(self, batch_size: int = 64, root: str | None = None, augment: int = 0, seed: int = 0, size: int = 32) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size}: emoji are square: give one side in pixels")
        self.batch_size, self.root, self.augment, self.seed, self.shape = batch_size, root, augment, seed, (3, size, size)

    def setup(self, stage: str | None = None) -> None:
        self.emoji = source.load(self.root, self.shape[-1])
        self.groups, self.held_out = self.emoji.groups(False), self.emoji.groups(True)
        self.train = self.emoji.pictures[torch.cat(self.groups)], None
        in_training, held_out = (self.emoji.concept[torch.cat(groups)] for groups in (self.groups, self.held_out))
        assert not torch.isin(in_training, held_out).any(), "a concept is both trained on and held out"
        epoch_rows(len(self.groups), self.batch_size, self.seed, 0)  # raises if the batch is too large

    def train_dataloader(self) -> DataLoader:
        return endless(self, self.batch, shared=False)

    def batch(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        """Return the batch with this number, which stands for an update, or for an update and a rank."""
        generator = stream(self.seed, "data", step)
        groups = [self.groups[g] for g in epoch_rows(len(self.groups), self.batch_size, self.seed, step).tolist()]
        picks = torch.rand(len(groups), generator=generator).tolist()
        rows = torch.stack([group[int(pick * len(group))] for group, pick in zip(groups, picks)])
        pictures = self.emoji.pictures[rows].float() / 255
        if self.augment:
            pictures = shift(pictures, self.augment, generator)
        return pictures, self.emoji.captions(rows, generator), self.emoji.concept[rows]

    def reference(self) -> Tensor:
        """Return one picture of each concept and style of the training data, (m, 3, h, w) in [0, 1]."""
        data = source.load(self.root, self.shape[-1])
        return data.pictures[torch.stack([group[0] for group in data.groups(held_out=False)])].float() / 255

    def prompts(self, held_out: bool) -> list[str]:
        """Return the plain caption of each concept, either of the held-out concepts or of the others."""
        data = source.load(self.root, self.shape[-1])
        return list(dict.fromkeys(data.caption(int(group[0])) for group in data.groups(held_out)))

    def folder(self) -> Path:
        """Return the folder of the pictures."""
        return source.data_folder(self.root)

    def val_dataloader(self) -> DataLoader:
        rows = torch.stack([group[0] for group in self.held_out])  # without skin tone
        parts = rows[self.emoji.style[rows].argsort(stable=True)].split(self.batch_size)
        whole: Any = [
            (self.emoji.pictures[r].float() / 255, [self.emoji.caption(int(i)) for i in r], self.emoji.concept[r])
            for r in parts
        ]
        return DataLoader(whole, batch_size=None)

    def captions(self, n: int, generator: torch.Generator) -> list[str]:
        """Draw random captions of n training pictures; call `setup` first."""
        groups = torch.randint(len(self.groups), (n,), generator=generator)
        return self.emoji.captions(torch.stack([self.groups[g][0] for g in groups.tolist()]), generator)

    @staticmethod
    def prepare(root: str | None, size: int, tick: Callable[[int, int], None]) -> tuple[list[list[str]], list[str]]:
        """Download and prepare the pictures. Returns a table, header first, and lines of text, both to print."""
        data = source.prepare(root, size, tick)
        table = [["style", "pictures", "with a skin tone", "package", "licence of the pictures"]]
        for style, (package, _, licence) in source.PACKS.items():
            mine = data.style == source.STYLES.index(style)
            table.append([style, f"{int(mine.sum()):,}", f"{int((data.tone[mine] > 0).sum()):,}", package, licence])
        held_out = int(data.held_out.sum())
        lines = [f"{len(data.names):,} concepts, {held_out} of them held out; captions: {source.WORDS} (MIT)"]
        return table, [*lines, f"in {source.data_folder(root)}, with credits.json"]
