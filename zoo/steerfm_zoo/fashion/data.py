"""Fashion-MNIST. The data are not shipped: they come from a package, a folder or a download."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from steerfm.files import data_root, where_set
from steerfm.randomness import stream
from steerfm.training.data import TensorBatches, endless, epoch_rows, shift_and_mirror

CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class FashionMnist(L.LightningDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test pictures, 28 x 28 grey, 10 classes (Xiao et al. 1708.07747, MIT).

    The data are read from ``root`` or from the Debian package ``dataset-fashion-mnist``, or downloaded by torchvision. If
    $STEERFM_DATA is set, only that folder is searched, and nothing is downloaded.

    Args:
        batch_size: rows per training batch.
        root: folder with the four idx .gz files; by default ``FashionMNIST/raw`` in $STEERFM_DATA or, if that is not set, the
            folder of the Debian package, else torchvision's download in ~/.cache/steerfm.
        augment: largest random shift, in pixels, together with mirroring; 0 for none.
        seed: seed of the order of training batches.
    """

    class_names = CLASSES
    asked = CLASSES
    shape = (1, 28, 28)
    licence = "MIT (Zalando SE)"

    def __init__(self, batch_size: int = 128, root: str | None = None, augment: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.root, self.augment, self.seed = batch_size, root, augment, seed

    def setup(self, stage: str | None = None) -> None:
        self.train, self.test = (fashion_mnist(split, self.root) for split in ("train", "test"))
        epoch_rows(len(self.train[1]), self.batch_size, self.seed, 0)  # raises if the batch is too large

    def train_dataloader(self) -> DataLoader:
        return endless(self, self.batch, shared=False)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the batch with this number, which stands for an update, or for an update and a rank."""
        pictures, labels = TensorBatches(*self.train)[epoch_rows(len(self.train[1]), self.batch_size, self.seed, number)]
        if self.augment:
            pictures = shift_and_mirror(pictures, self.augment, stream(self.seed, "augmentation", number))
        return pictures, labels

    def val_dataloader(self) -> DataLoader:
        batches = BatchSampler(SequentialSampler(self.test[1]), 500, drop_last=False)
        return DataLoader(TensorBatches(*self.test), sampler=batches, batch_size=None)

    @staticmethod
    def prepare(root: str | None, size: int, tick: Callable[[int, int], None]) -> tuple[list[list[str]], list[str]]:
        """Check that the data are present, or download them. Returns no table, and lines of text to print."""
        lines = []
        for split in ("train", "test"):
            pictures, labels = fashion_mnist(split, root, fetch=True)
            lines.append(f"{split}: {len(pictures):,} pictures, {labels.bincount().tolist()} of each class")
        return [], [*lines, f"licence: {FashionMnist.licence}"]


def fashion_mnist(split: str, root: str | None = None, fetch: bool = False) -> tuple[Tensor, Tensor]:
    """Load pictures (n, 1, 28, 28) uint8 and labels (n,) int64.

    Args:
        split: ``train`` or ``test``.
        root: see `FashionMnist`.
        fetch: whether torchvision may download missing files into $STEERFM_DATA; if that is not set, it always may.

    Raises:
        FileNotFoundError: the data are missing. The message says how to install them.
    """
    try:
        folder = fashion_folder(split, root)
    except FileNotFoundError:
        if root or (os.environ.get("STEERFM_DATA") and not fetch):
            raise
        try:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(data_root()), download=True)
        except (ImportError, OSError, RuntimeError):
            pass
        folder = fashion_folder(split)
    pictures, labels = (_read_idx(folder / name) for name in FILES[split])
    return pictures.unsqueeze(1), labels.long()


FILES = {
    split: (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    for split, prefix in (("train", "train"), ("test", "t10k"))
}


def fashion_folder(split: str, root: str | None = None) -> Path:
    """Return the first folder that holds the files of a split, in the order given in `FashionMnist`. Nothing is downloaded.

    Raises:
        FileNotFoundError: as for `fashion_mnist`.
    """
    folders = [Path(root)] if root else [data_root() / "FashionMNIST" / "raw"]
    if not root and not os.environ.get("STEERFM_DATA"):
        folders.insert(0, Path("/usr/share/datasets/fashion-mnist"))
    for folder in folders:
        if all((folder / name).is_file() for name in FILES[split]):
            return folder
    raise FileNotFoundError(
        f"Fashion-MNIST not found in {', '.join(map(str, folders))}: run 'apt-get install dataset-fashion-mnist', "
        f"or set data.root to the folder with the four .gz files{where_set(root)}"
    )


def _read_idx(path: Path) -> Tensor:
    """Read an idx file: two zero bytes, a type byte, the number of axes, the big-endian sizes, then the values."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    sizes = np.frombuffer(raw, ">u4", count=axes, offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(sizes.astype(int)).copy())
