"""What data modules are made of: batches that follow from their number, shifts and mirrors; and mixtures, for toy maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from steerfm.randomness import stream


class TensorBatches(Dataset):
    """Pictures (n, c, h, w) uint8 and labels (n,), indexed by whole batches: no per-sample collation."""

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self.pictures, self.labels = pictures, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: list[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(pictures float in [0, 1], labels) of a batch of indices."""
        rows = torch.as_tensor(index)
        return self.pictures[rows].float() / 255, self.labels[rows]


def epoch_rows(n: int, batch_size: int, seed: int, number: int) -> Tensor:
    """Which of ``n`` rows are in the batch of a number, (batch_size,): every epoch has an order of its own, and whole batches.

    Raises:
        ValueError: more rows in a batch than there are.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size={batch_size}: there are {n:,} rows to train on, take 1 to {n:,}")
    epoch, place = divmod(number, n // batch_size)
    return _order(n, seed, epoch)[place * batch_size : (place + 1) * batch_size]


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=stream(seed, "order", epoch))


class MixtureData(L.LightningDataModule):
    """Endless fresh samples of a Gaussian mixture, for toy maps of vectors: batches (x (b, d) float32, labels of zeros).

    Args:
        mixture: anything with ``sample(n, generator)``, such as `GaussianMixture`.
        batch_size: rows.
        seed: of the samples.
    """

    def __init__(self, mixture: Any, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.mixture, self.batch_size, self.seed = mixture, batch_size, seed

    def train_dataloader(self) -> DataLoader:
        return endless(self, self.batch, shared=False)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a number."""
        x = self.mixture.sample(self.batch_size, stream(self.seed, "data", step))
        return x.float(), torch.zeros(len(x), dtype=torch.long)


def endless(data: L.LightningDataModule, batch: Callable[[int], Any], shared: bool = True) -> DataLoader:
    """Batches made from the number of their update, from the one that the trainer has come to: a continued run goes on.

    Args:
        shared: the same for all ranks; otherwise every rank has numbers of its own.
    """
    step, ranks, rank = (
        (data.trainer.global_step, data.trainer.world_size, data.trainer.global_rank) if data.trainer else (0, 1, 0)
    )
    batches = _Endless(batch, step, 1) if shared else _Endless(batch, step * ranks + rank, ranks)
    return DataLoader(batches, batch_size=None, generator=torch.Generator())  # without one it moves the global random state


class _Endless(IterableDataset):
    def __init__(self, batch: Callable[[int], Any], start: int, stride: int) -> None:
        self.batch, self.start, self.stride = batch, start, stride

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, count(self.start, self.stride))


def shift(pictures: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each picture by up to ``pixels`` in both directions, repeating its border."""
    b, _, h, w = pictures.shape
    padded = F.pad(pictures, (pixels,) * 4, mode="replicate")
    dx, dy = torch.randint(0, 2 * pixels + 1, (2, b), generator=generator)
    rows, columns = dy[:, None] + torch.arange(h), dx[:, None] + torch.arange(w)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def shift_and_mirror(pictures: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each picture by up to ``pixels`` in both directions and mirror half of them."""
    b, _, h, w = pictures.shape
    padded = F.pad(pictures, (pixels,) * 4)
    dx, dy = torch.randint(0, 2 * pixels + 1, (2, b), generator=generator)
    rows = dy[:, None] + torch.arange(h)
    columns = dx[:, None] + torch.arange(w)
    mirror = torch.rand(b, generator=generator) < 0.5
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
