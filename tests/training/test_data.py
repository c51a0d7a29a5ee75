"""Data: the idx format, batches, augmentation, order, and what is said where the files are missing."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from steerfm_zoo.fashion.data import CLASSES, FashionMnist, fashion_mnist

from steerfm import GaussianMixture
from steerfm.cli.parts import data_set
from steerfm.training.data import MixtureData, TensorBatches, shift_and_mirror


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


@pytest.fixture
def folder(tmp_path):
    """The four files with 12 training and 6 test pictures of 5 x 4."""
    random = np.random.default_rng(0)
    for prefix, n in (("train", 12), ("t10k", 6)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", random.integers(0, 256, (n, 5, 4)))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return tmp_path


# --- files -----------------------------------------------------------------------------------------------------------
def test_reading_idx_files(folder):
    random = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 6)):
        pictures, labels = fashion_mnist(split, str(folder))
        assert (pictures.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(pictures, torch.from_numpy(random.integers(0, 256, (n, 1, 5, 4))).byte())
        assert labels.tolist() == [i % 10 for i in range(n)]


def test_sizes_are_big_endian(tmp_path):
    """More than 255 rows need the second byte of the size."""
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", np.zeros((300, 2, 2)))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(300) % 10)
    assert fashion_mnist("train", str(tmp_path))[0].shape == (300, 1, 2, 2)


@pytest.mark.parametrize("missing", ["all", "train-labels-idx1-ubyte.gz"])
def test_missing_data_name_the_command(folder, tmp_path_factory, missing):
    if missing == "all":
        folder = tmp_path_factory.mktemp("empty")
    else:
        (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist") as error:
        FashionMnist(root=str(folder)).setup()
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_the_environment_hides_all_others_and_nothing_is_fetched(folder, tmp_path_factory, monkeypatch):
    """With STEERFM_DATA the data are in that folder or nowhere, and the error says so; without it, in the usual places."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "FashionMNIST").mkdir()
    (hidden / "FashionMNIST" / "raw").symlink_to(folder)
    monkeypatch.setenv("STEERFM_DATA", str(hidden))
    assert len(fashion_mnist("test")[1]) == 6
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("STEERFM_DATA", str(empty))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # would be an ImportError, were it asked
    for read, command in (
        (lambda: fashion_mnist("test"), "apt-get install dataset-fashion-mnist"),
        (data_set("fashion")().setup, "apt-get install dataset-fashion-mnist"),
        (data_set("emoji")().setup, "steerfm data emoji"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(f"STEERFM_DATA={empty} is set")) as error:
            read()
        assert command in str(error.value) and "/usr/share" not in str(error.value)
    assert not list(empty.iterdir())
    assert len(fashion_mnist("test", str(folder))[1]) == 6  # a folder that is named comes first
    with pytest.raises(FileNotFoundError) as error:
        fashion_mnist("test", str(empty))
    assert "STEERFM_DATA" not in str(error.value)
    monkeypatch.setenv("STEERFM_DATA", "")  # as if it were not set
    with pytest.raises(FileNotFoundError, match=r"/usr/share/datasets/fashion-mnist.*, .*cache/steerfm"):
        monkeypatch.setattr(Path, "is_file", lambda self: False)
        fashion_mnist("test")


# --- batches ---------------------------------------------------------------------------------------------------------
def test_batches_are_floats_in_the_unit_interval():
    pictures = torch.arange(256).byte().view(16, 1, 4, 4)
    batches = TensorBatches(pictures, torch.arange(16))
    x, labels = batches[[3, 15]]
    assert len(batches) == 16
    assert torch.equal(x, pictures[[3, 15]].float() / 255)
    assert x.max() == 1
    assert labels.tolist() == [3, 15]


def seen(data: FashionMnist, batches: int = 10) -> list[list[int]]:
    """Labels of the next batches; an epoch of 42 rows has ten."""
    return [labels.tolist() for (_, labels), _ in zip(data.train_dataloader(), range(batches))]


@pytest.fixture
def many(folder):
    """Labels are row numbers, to see the order."""
    data = FashionMnist(batch_size=4, root=str(folder))
    data.setup()
    data.train = (torch.zeros(42, 1, 5, 4, dtype=torch.uint8), torch.arange(42))
    return data


def test_an_epoch_visits_each_picture_once(many):
    batches = seen(many)
    assert [len(batch) for batch in batches] == [4] * 10  # the last two rows wait for the next epoch
    assert len({i for batch in batches for i in batch}) == 40


def test_epochs_differ_and_seeds_fix_the_order(many):
    both = seen(many, 20)
    first, second = both[:10], both[10:]
    assert first != second
    assert seen(many) == first
    many.seed = 1
    assert seen(many) != first
    many.seed = 2**32  # torch's generator would take it for 0
    assert seen(many) != first


def test_a_continued_run_goes_on_in_the_same_order(many):
    whole = seen(many, 20)
    for step in (0, 6, 13):
        many.trainer = SimpleNamespace(global_step=step, world_size=1, global_rank=0)
        assert seen(many, 7) == whole[step : step + 7]


def test_two_processes_share_out_the_batches_of_one(many):
    whole = seen(many, 20)
    for rank in (0, 1):
        many.trainer = SimpleNamespace(global_step=3, world_size=2, global_rank=rank)
        assert seen(many, 5) == whole[6 + rank : 16 + rank : 2]


def test_a_batch_of_more_rows_than_there_are_is_refused_before_training(folder):
    with pytest.raises(ValueError, match="batch_size=5000: there are"):
        FashionMnist(batch_size=5000, root=str(folder)).setup()


def test_validation_is_whole_and_in_order(many):
    assert [labels.tolist() for _, labels in many.val_dataloader()] == [[0, 1, 2, 3, 4, 5]]


# --- augmentation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 8, 6), (3, 6, 8)])
def test_augmentation_keeps_shape_and_range(shape):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (40, *shape), generator=generator).byte()
    x = shift_and_mirror(pictures.float() / 255, 2, generator)
    assert x.shape == (40, *shape)
    assert x.min() >= 0
    assert x.max() <= 1
    assert not torch.equal(x, pictures.float() / 255)


def test_augmentation_only_shifts_and_mirrors():
    """A bright pixel in the middle stays one bright pixel, within reach; channels move together."""
    pictures = torch.zeros(200, 2, 9, 9, dtype=torch.uint8)
    pictures[:, 0, 4, 3], pictures[:, 1, 4, 3] = 255, 51
    x = shift_and_mirror(pictures.float() / 255, 2, torch.Generator().manual_seed(0))
    assert torch.equal(x.sum((2, 3)), torch.tensor([[1.0, 0.2]]).expand(200, 2))
    spots = x[:, 0].nonzero()[:, 1:]
    assert torch.equal(x[:, 1].nonzero()[:, 1:], spots)
    assert spots[:, 0].unique().tolist() == [2, 3, 4, 5, 6]
    assert spots[:, 1].unique().tolist() == [1, 2, 3, 4, 5, 6, 7]  # columns 3 and, mirrored, 5, each +- 2
    mirrored = (spots[:, 1] > 5).sum() / (spots[:, 1] != spots[:, 1].clamp(3, 5)).sum()
    assert 0.25 < mirrored < 0.75


def test_augmentation_belongs_to_the_seed_and_the_batch(many):
    """The same picture in every row: what differs is the augmentation."""
    picture = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    many.train, many.augment = (picture.expand(42, -1, -1, -1), many.train[1]), 2
    first = [many.batch(number)[0] for number in range(30)]
    assert torch.equal(many.batch(7)[0], first[7])
    assert len({tuple(x.flatten().tolist()) for x in first}) == 30
    many.seed = 2**32
    assert not torch.equal(many.batch(7)[0], first[7])


# --- the installed data ----------------------------------------------------------------------------------------------
@pytest.mark.data("fashion")
def test_fashion_mnist_as_installed():
    data = data_set("fashion")(batch_size=64)
    data.setup()
    assert len(data.class_names) == len(CLASSES) == 10
    for (pictures, labels), each in ((data.train, 6000), (data.test, 1000)):
        assert pictures.shape == (10 * each, *data.shape)
        assert pictures.dtype == torch.uint8
        assert labels.bincount().tolist() == [each] * 10
    assert data.train[0].float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)  # the published statistics
    pictures, labels = next(iter(data.train_dataloader()))
    assert pictures.shape == (64, 1, 28, 28)
    assert labels.shape == (64,)
    assert pictures.aminmax() == (0, 1)
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 10_000


def test_loaders_leave_the_global_random_state_alone():
    data = MixtureData(GaussianMixture([[0.0]], [[1.0]]), batch_size=4)
    before = torch.get_rng_state()
    assert len(next(iter(data.train_dataloader()))[0]) == 4
    assert torch.equal(torch.get_rng_state(), before)
