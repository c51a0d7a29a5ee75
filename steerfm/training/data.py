"""LightningDataModules. No data are shipped: loaders read what a package installs, and name it when it is missing."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from steerfm import emoji
from steerfm.randomness import stream

FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


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


class FashionMnist(L.LightningDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test pictures, 28 x 28 grey, 10 classes (Xiao et al. 1708.07747, MIT).

    Read from the Debian package ``dataset-fashion-mnist``, from ``root``, or fetched by torchvision where there is a network.
    Where $STEERFM_DATA is set, it is the only folder that is looked in, and nothing is fetched.

    Args:
        batch_size: rows per training batch.
        root: folder with the four idx .gz files; default: ``FashionMNIST/raw`` in $STEERFM_DATA, or where that is not set,
            the Debian package's folder, else torchvision's download in ~/.cache/steerfm.
        augment: pixels of random shift (with mirroring); 0 for none.
        seed: order of the training batches.
    """

    class_names = FASHION_CLASSES
    asked = FASHION_CLASSES
    shape = (1, 28, 28)
    licence = "MIT (Zalando SE)"

    def __init__(self, batch_size: int = 128, root: str | None = None, augment: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.root, self.augment, self.seed = batch_size, root, augment, seed

    def setup(self, stage: str | None = None) -> None:
        self.train, self.test = (fashion_mnist(split, self.root) for split in ("train", "test"))
        epoch_rows(len(self.train[1]), self.batch_size, self.seed, 0)  # a batch that is too large is refused here

    def train_dataloader(self) -> DataLoader:
        return endless(self, self.batch, shared=False)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The batch of a number: of an update, or of an update and a rank."""
        pictures, labels = TensorBatches(*self.train)[epoch_rows(len(self.train[1]), self.batch_size, self.seed, number)]
        if self.augment:
            pictures = shift_and_mirror(pictures, self.augment, stream(self.seed, "augmentation", number))
        return pictures, labels

    def val_dataloader(self) -> DataLoader:
        batches = BatchSampler(SequentialSampler(self.test[1]), 500, drop_last=False)
        return DataLoader(TensorBatches(*self.test), sampler=batches, batch_size=None)


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


class EmojiData(L.LightningDataModule):
    """Emoji in three styles with captions (`steerfm.emoji`): batches (pictures in [0, 1], captions, concepts (b,)).

    An epoch holds each concept once per style, in a random skin tone and with a random caption. Validation is the held-out
    concepts, each style once, with their plain captions.

    Args:
        batch_size: rows per training batch.
        root: folder of the prepared data, see `emoji.data_folder`.
        augment: pixels of random shift.
        seed: of the batches.
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
    licence = emoji.LICENCE

    def __init__(self, batch_size: int = 64, root: str | None = None, augment: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.root, self.augment, self.seed = batch_size, root, augment, seed

    def setup(self, stage: str | None = None) -> None:
        self.emoji = emoji.load(self.root, self.shape[-1])
        self.groups, self.held_out = self.emoji.groups(False), self.emoji.groups(True)
        self.train = self.emoji.pictures[torch.cat(self.groups)], None
        trained, held_out = (self.emoji.concept[torch.cat(groups)] for groups in (self.groups, self.held_out))
        assert not torch.isin(trained, held_out).any(), "a concept is both trained on and held out"
        epoch_rows(len(self.groups), self.batch_size, self.seed, 0)  # a batch that is too large is refused here

    def train_dataloader(self) -> DataLoader:
        return endless(self, self.batch, shared=False)

    def batch(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        """The batch of a number: of an update, or of an update and a rank."""
        generator = stream(self.seed, "data", step)
        chosen = [self.groups[g] for g in epoch_rows(len(self.groups), self.batch_size, self.seed, step).tolist()]
        picks = torch.rand(len(chosen), generator=generator).tolist()
        rows = torch.stack([group[int(pick * len(group))] for group, pick in zip(chosen, picks)])
        pictures = self.emoji.pictures[rows].float() / 255
        if self.augment:
            pictures = _shift(pictures, self.augment, generator)
        return pictures, self.emoji.captions(rows, generator), self.emoji.concept[rows]

    def reference(self) -> Tensor:
        """Pictures (m, 3, h, w) in [0, 1] of the training data, one of each concept and style."""
        data = emoji.load(self.root, self.shape[-1])
        return data.pictures[torch.stack([group[0] for group in data.groups(held_out=False)])].float() / 255

    def prompts(self, held_out: bool) -> list[str]:
        """The plain caption of each concept, of those that are trained on or of the others."""
        data = emoji.load(self.root, self.shape[-1])
        return list(dict.fromkeys(data.caption(int(group[0])) for group in data.groups(held_out)))

    def folder(self) -> Path:
        """Where the pictures are."""
        return emoji.data_folder(self.root)

    def val_dataloader(self) -> DataLoader:
        rows = torch.stack([group[0] for group in self.held_out])  # no skin tone
        parts = rows[self.emoji.style[rows].argsort(stable=True)].split(self.batch_size)
        whole: Any = [
            (self.emoji.pictures[r].float() / 255, [self.emoji.caption(int(i)) for i in r], self.emoji.concept[r])
            for r in parts
        ]
        return DataLoader(whole, batch_size=None)


def endless(data: L.LightningDataModule, batch: Callable[[int], Any], shared: bool = True) -> DataLoader:
    """Batches made from the number of their update, from the one that the trainer has come to: a continued run goes on.

    Args:
        shared: the same for all ranks; otherwise every rank has numbers of its own.
    """
    step, ranks, rank = (
        (data.trainer.global_step, data.trainer.world_size, data.trainer.global_rank) if data.trainer else (0, 1, 0)
    )
    return DataLoader(_Endless(batch, step, 1) if shared else _Endless(batch, step * ranks + rank, ranks), batch_size=None)


class _Endless(IterableDataset):
    def __init__(self, batch: Callable[[int], Any], start: int, stride: int) -> None:
        self.batch, self.start, self.stride = batch, start, stride

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, count(self.start, self.stride))


DATA: dict[str, type[FashionMnist] | type[EmojiData]] = {"fashion": FashionMnist, "emoji": EmojiData}
"""Data sets by the name that configurations use."""


def fashion_mnist(split: str, root: str | None = None, fetch: bool = False) -> tuple[Tensor, Tensor]:
    """Pictures (n, 1, 28, 28) uint8 and labels (n,) int64 of the split ``train`` or ``test``.

    Args:
        split: ``train`` or ``test``.
        root: see `FashionMnist`.
        fetch: let torchvision fetch missing files into $STEERFM_DATA too. Where that is not set, it always may.

    Raises:
        FileNotFoundError: naming the ways to install the data.
    """
    try:
        folder = fashion_folder(split, root)
    except FileNotFoundError:
        if root or (os.environ.get("STEERFM_DATA") and not fetch):
            raise
        try:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(emoji.data_root()), download=True)
        except (ImportError, OSError, RuntimeError):
            pass
        folder = fashion_folder(split)
    pictures, labels = (_read_idx(folder / name) for name in FASHION_FILES[split])
    return pictures.unsqueeze(1), labels.long()


FASHION_FILES = {
    split: (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    for split, prefix in (("train", "train"), ("test", "t10k"))
}


def fashion_folder(split: str, root: str | None = None) -> Path:
    """The first of the folders of `FashionMnist` that holds the files of a split. Nothing is fetched.

    Raises:
        FileNotFoundError: as for `fashion_mnist`.
    """
    folders = [Path(root)] if root else [emoji.data_root() / "FashionMNIST" / "raw"]
    if not root and not os.environ.get("STEERFM_DATA"):
        folders.insert(0, Path("/usr/share/datasets/fashion-mnist"))
    for folder in folders:
        if all((folder / name).is_file() for name in FASHION_FILES[split]):
            return folder
    raise FileNotFoundError(
        f"Fashion-MNIST not found in {', '.join(map(str, folders))}: run 'apt-get install dataset-fashion-mnist', "
        f"or set data.root to the folder with the four .gz files{emoji.where_set(root)}"
    )


def _read_idx(path: Path) -> Tensor:
    """The idx format: two zero bytes, a type byte, the number of axes, the big-endian sizes, then the bytes."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    sizes = np.frombuffer(raw, ">u4", count=axes, offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(sizes.astype(int)).copy())


def _shift(pictures: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
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
