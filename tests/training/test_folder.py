"""A folder of pictures as a data set: its forms, what is read of a picture, the part that is held out, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steerfm import testing, zoo
from steerfm.cli import loading, main
from steerfm.cli.config import TrainConfig
from steerfm.cli.train import load_data
from steerfm.flowmap import NeuralFlowMap
from steerfm.metrics.evaluator import Evaluator
from steerfm.metrics.spaces import Space
from steerfm.networks import UNet
from steerfm.training.folder import FolderData, read_picture

Make = Callable[..., Path]


def noise(seed: int, shape: tuple[int, ...] = (8, 8, 3), dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read(path: Path, size: tuple[int, int] = (8, 8), channels: int | None = None, fit: str = "crop") -> np.ndarray:
    return read_picture(path, size, channels, fit)


@pytest.fixture
def classes(tmp_path) -> Path:
    for seed in range(40):
        save(tmp_path / "pics" / ("cat", "dog", "owl")[seed % 3] / f"{seed}.png", noise(seed))
    return tmp_path / "pics"


@pytest.fixture(params=["metadata", "texts"])
def captioned(request, tmp_path) -> Path:
    root, lines = tmp_path / "pics", []
    for seed in range(20):
        save(root / f"{seed}.png", noise(seed))
        text = f"picture number {seed % 10}"
        if request.param == "texts":
            (root / f"{seed}.txt").write_text(f"{text}\n")
        lines.append(json.dumps({"file_name": f"{seed}.png", "text": text, "more": 3}))
    if request.param == "metadata":
        (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def plain(tmp_path) -> Path:
    for seed in range(20):
        save(tmp_path / "pics" / f"{seed}.png", noise(seed))
    return tmp_path / "pics"


def ready(root: Path, **options) -> FolderData:
    data = FolderData(**{"batch_size": 4, "root": str(root), "size": 8} | options)
    data.setup()
    return data


# --- forms -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"flip": True, "augment": 2, "fit": "pad", "size": [8, 12]}, {"channels": 1}], ids=str)
@pytest.mark.parametrize("form", ["classes", "plain"])
def test_every_form_keeps_the_contract(request, form, options):
    testing.check_data(FolderData(4, str(request.getfixturevalue(form)), **({"size": 8} | options)))


def test_captions_keep_the_contract_and_stay_with_their_pictures(captioned):
    testing.check_data(FolderData(4, str(captioned), size=8))
    data = ready(captioned)
    pictures, texts, numbers = data.batch(5)
    for picture, text, number in zip(pictures, texts, numbers.tolist()):
        (seed,) = (s for s in range(20) if torch.equal(torch.from_numpy(noise(s)).permute(2, 0, 1), (picture * 255).byte()))
        assert text == f"picture number {seed % 10}"
        assert data.numbers[text] == number
    assert data.class_names == ()
    assert set(data.prompts(False)) | set(data.prompts(True)) == {f"picture number {i}" for i in range(10)}


def test_labels_are_those_of_the_folders(classes):
    data = ready(classes, batch_size=8)
    assert data.class_names == data.asked == ("cat", "dog", "owl")
    pictures, labels = data.batch(0)
    for picture, label in zip((pictures * 255).byte(), labels.tolist()):
        (seed,) = (s for s in range(40) if torch.equal(torch.from_numpy(noise(s)).permute(2, 0, 1), picture))
        assert seed % 3 == label


def test_pictures_alone_have_no_classes_and_no_captions(plain):
    data = ready(plain)
    assert data.class_names == data.asked == () and data.prompts(True) == []
    assert data.batch(0)[1] == [""] * 4


def test_notes_and_files_of_systems_are_passed_over(classes):
    before = ready(classes).digest()
    for name in ("README.md", "LICENSE", ".DS_Store", "cat/.hidden.png", "cat/Thumbs.db", "desktop.ini"):
        (classes / name).write_text("x")
    assert ready(classes).digest() == before


# --- pictures --------------------------------------------------------------------------------------------------------
def test_of_the_right_size_all_lossless_forms_are_read_as_they_are(tmp_path):
    colour, grey = noise(0), noise(1, (8, 8))
    for ending in ("png", "bmp", "tif", "ppm", "webp"):
        assert (read(save(tmp_path / f"a.{ending}", colour, **({"lossless": True} if ending == "webp" else {})))
                == colour.transpose(2, 0, 1)).all(), ending  # fmt: skip
    for ending in ("png", "bmp", "tif", "pgm"):
        assert (read(save(tmp_path / f"g.{ending}", grey)) == grey[None]).all(), ending
    few = noise(2, (8, 8, 3)) // 64 * 64
    Image.fromarray(few).quantize(64).save(tmp_path / "palette.png")
    assert read(tmp_path / "palette.png").shape == (3, 8, 8)
    assert (read(tmp_path / "palette.png") == few.transpose(2, 0, 1)).all()


def test_sixteen_bits_become_eight_and_not_white(tmp_path):
    """Pillow's own conversion cuts off at 255."""
    deep = noise(0, (8, 8), np.uint16)
    shown = read(save(tmp_path / "deep.png", deep))
    assert shown.shape == (1, 8, 8)
    assert (abs(shown[0] - deep / 257) <= 0.5).all()
    assert (read(tmp_path / "deep.png", channels=3) == shown).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    opaque = np.full((8, 8, 4), 255, np.uint8)
    opaque[..., :3] = 60
    opaque[:, :4, 3] = 0
    picture = Image.fromarray(opaque)
    if mode == "P":
        picture = Image.fromarray(np.where(np.arange(8) < 4, 1, 0).astype(np.uint8)[None].repeat(8, 0), "L").convert("P")
        picture.putpalette([60, 60, 60, 10, 20, 30])
        picture.save(tmp_path / "a.png", transparency=1)
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    shown = read(tmp_path / "a.png")
    assert shown.shape[0] == (1 if mode == "LA" else 3)
    assert (shown[:, :, :4] == 255).all() and (shown[:, :, 4:] == 60).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_upright_as_their_exif_says(tmp_path, turn):
    upright = noise(0)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = turn
    save(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    assert (read(tmp_path / "a.png") == upright.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (7, 9), (1, 1), (31, 64)])
@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_crop_fills_and_pad_shows_all(tmp_path, shape, size):
    black = save(tmp_path / "a.png", np.zeros((*shape, 3), np.uint8))
    assert read(black, size).shape == (3, *size)
    assert (read(black, size) == 0).all()
    padded = read(black, size, fit="pad")
    assert padded.shape == (3, *size)
    ratio = min(size[0] / shape[0], size[1] / shape[1])
    covered = max(1, round(shape[0] * ratio)) * max(1, round(shape[1] * ratio))
    assert ((padded == 0).sum() / 3 == pytest.approx(covered, rel=0.15)) and set(np.unique(padded)) <= {0, 255}


def test_crop_takes_the_middle(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = noise(0)
    assert (read(save(tmp_path / "a.png", wide)) == noise(0).transpose(2, 0, 1)).all()


def test_channels_are_as_asked(tmp_path):
    colour, grey = save(tmp_path / "c.png", noise(0)), save(tmp_path / "g.png", noise(1, (8, 8)))
    assert read(colour, channels=1).shape == (1, 8, 8) and read(grey, channels=3).shape == (3, 8, 8)
    assert abs(read(colour, channels=1)[0] - noise(0) @ [0.299, 0.587, 0.114]).max() <= 1


# --- the part that is held out ---------------------------------------------------------------------------------------
def bytes_of(pictures: torch.Tensor) -> set[bytes]:
    return {picture.numpy().tobytes() for picture in (pictures * 255).round().byte()}


def trained_on(data: FolderData) -> set[bytes]:
    epoch = len(data.train[0]) // data.batch_size
    return {key for number in range(3 * epoch) for key in bytes_of(data.batch(number)[0])}


@pytest.mark.parametrize("flip", [False, True])
def test_no_step_sees_what_is_held_out_though_a_copy_or_a_mirror_image_of_it_is_there(classes, flip):
    for seed in range(40):
        save(classes / "dog" / f"copy-{seed}.bmp", noise(seed))
        save(classes / "owl" / f"mirror-{seed}.png", np.ascontiguousarray(noise(seed)[:, ::-1]))
    data = ready(classes, flip=flip, held_out=0.3)
    held = bytes_of(torch.cat([batch[0] for batch in data.val_dataloader()]))
    assert len(data.test[0]) + len(data.train[0]) == 120 and len(held) == len(bytes_of(data.reference()))
    assert held and not held & trained_on(data)


def test_pictures_stay_on_their_side_when_others_come_and_names_change(classes):
    before = ready(classes)
    for seed in range(100, 140):
        save(classes / "cat" / f"{seed}.png", noise(seed))
    (classes / "cat" / "0.png").rename(classes / "cat" / "zzz.png")
    (classes / "owl").rename(classes / "ant")
    after = ready(classes)
    assert bytes_of(before.reference()) <= bytes_of(after.reference())
    assert not bytes_of(before.train[0] / 255) & bytes_of(after.reference())


def test_the_share_is_about_what_was_asked_for(tmp_path):
    for seed in range(300):
        save(tmp_path / f"{seed}.bmp", noise(seed, (2, 2, 3)))
    n = len(ready(tmp_path, held_out=0.2, size=2).test[0])
    assert abs(n - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5


def test_every_class_is_trained_on_and_something_is_held_out(tmp_path):
    """However small the classes and however large or small the share."""
    for seed in range(12):
        save(tmp_path / f"class-{seed % 6}" / f"{seed}.png", noise(seed))
    for share in (0.001, 0.5, 0.999):
        data = ready(tmp_path, held_out=share, batch_size=1)
        labels = data.train[1]
        assert labels is not None and set(labels.tolist()) == set(range(6)) and len(data.test[0]) > 0, share


def test_flips_mirror_half_and_shifts_repeat_the_border(plain):
    own, flipped = ready(plain, batch_size=16), ready(plain, batch_size=16, flip=True)
    same = mirrored = 0
    for number in range(20):
        for a, b in zip(own.batch(number)[0], flipped.batch(number)[0]):
            same, mirrored = same + torch.equal(a, b), mirrored + torch.equal(a, b.flip(2))
    assert same + mirrored == 320 and abs(same - 160) < 4 * 80**0.5
    shifted = ready(plain, batch_size=16, augment=1)
    assert not torch.equal(shifted.batch(0)[0], own.batch(0)[0])


# --- what is refused -------------------------------------------------------------------------------------------------
def drop(root: Path, name: str, text: str = "") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def torn(root: Path, name: str) -> None:
    whole = save(root / name, noise(0, (64, 64, 3))).read_bytes()
    (root / name).write_bytes(whole[: len(whole) // 2])


BAD = {
    "a class folder without pictures": (lambda root: (root / "emu").mkdir(), {}, "emu is a class folder without pictures"),
    "a text with a picture's name": (lambda root: drop(root, "cat/x.png", "no"), {}, "x.png is no picture that can be read"),
    "an empty file": (lambda root: drop(root, "cat/x.jpg"), {}, "x.jpg is no picture that can be read"),
    "a torn picture": (lambda root: torn(root, "owl/t.png"), {}, "t.png is no picture that can be read"),
    "a torn photograph": (lambda root: torn(root, "owl/t.jpg"), {}, "t.jpg is no picture that can be read"),
    "another file": (lambda root: drop(root, "cat/list.csv", "a"), {}, "list.csv is no picture: move it away"),
    "grey among colour": (lambda root: save(root / "dog" / "g.png", noise(0, (8, 8))), {}, r"g\.png.*channels=1 or"),
    "a picture beside the classes": (lambda root: save(root / "x.png", noise(0)), {}, "x.png lies beside class folders"),
    "captions and classes": (lambda root: drop(root, "cat/0.txt", "a cat"), {}, r"class folders .*captions"),
    "metadata and classes": (lambda root: drop(root, "metadata.jsonl", "{}"), {}, r"class folders .*captions"),
    "one name twice": (lambda root: save(root / "CAT" / "x.png", noise(0)), {}, "CAT and cat"),
    "a batch that is too large": (lambda root: None, {"batch_size": 41}, r"=41.* 40 pictures.*batch_size=\d+ at most"),
    "no size": (lambda root: None, {"size": 0}, "size=0"),
    "three sizes": (lambda root: None, {"size": [8, 8, 3]}, r"size=\[8, 8, 3\]"),
    "four channels": (lambda root: None, {"channels": 4}, "channels=4: give 1 for grey or 3 for colour"),
    "another fit": (lambda root: None, {"fit": "corp"}, "crop"),
    "all held out": (lambda root: None, {"held_out": 1.0}, "held_out=1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_the_fix_in_python_and_on_the_command_line(classes, case):
    spoil, options, message = BAD[case]
    spoil(classes)
    with pytest.raises(ValueError, match=message) as error:
        ready(classes, **options)
    assert "\n" not in str(error.value) and "data." not in str(error.value).replace("metadata.", "")
    overrides = [f"data.{key}={value}" for key, value in {"batch_size": 4, "size": 8, **options}.items()]
    with pytest.raises(ValueError) as told:
        load_data(loading.load(TrainConfig, "folder", [f"data.root={classes}", *overrides]))
    said = str(told.value)
    assert "\n" not in said and not re.search(r"(?<![\w.])(size|channels|fit|held_out|batch_size|root)=", said), said


def test_a_folder_that_is_not_there_empty_or_a_file(tmp_path):
    save(tmp_path / "a.png", noise(0))
    (tmp_path / "empty").mkdir()
    for root, message in (("gone", "no such folder"), ("empty", "no pictures in it"), ("a.png", "is a file")):
        with pytest.raises((ValueError, FileNotFoundError), match=f"root=.*{root}.*{message}"):
            ready(tmp_path / root)
    with pytest.raises(ValueError, match="root=pictures/"):
        FolderData(4).setup()


def test_pictures_that_are_all_alike_leave_nothing_to_hold_out(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", noise(0))
    with pytest.raises(ValueError, match="add some that differ"):
        ready(tmp_path, batch_size=1)


def test_captions_that_are_missing_or_of_nothing_are_named(captioned):
    save(captioned / "naked.png", noise(99))
    with pytest.raises(ValueError, match=r"no caption for naked\.png"):
        ready(captioned)
    (captioned / "naked.png").unlink()
    (captioned / "3.png").unlink()
    with pytest.raises(ValueError, match=r"3\.(png|txt)"):
        ready(captioned)


@pytest.mark.parametrize(
    "line", ["{", "3", '{"file_name": "0.png"}', '{"text": "a"}', '{"file_name": "../0.png", "text": "a"}',
             '{"file_name": "0.png", "text": "again"}'],
)  # fmt: skip
def test_lines_of_captions_that_cannot_be_read_are_named(tmp_path, line):
    save(tmp_path / "0.png", noise(0))
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "a"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 3"):
        ready(tmp_path)


# --- a training of it ------------------------------------------------------------------------------------------------
SMALL = [
    "name=mine",
    "data.size=8", "data.batch_size=4", "network.widths=[8,16]", "optimizer.steps=4", "optimizer.warmup=1",
    "trainer.accelerator=cpu", "trainer.validate_every=2", "trainer.sample_every=4", "objective.keep=8", "objective.uses=2",
]  # fmt: skip


TUNE = [
    "optimizer.steps=2", "distil.steps=2", "distil.samples=8", "distil.batch_size=8", "watch.every=1", "watch.n=4",
    "watch.base=8", "trainer.accelerator=cpu",
]  # fmt: skip


def run(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERFM_DATA", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_four_commands_from_a_folder_of_classes_to_a_steered_picture(classes, here):
    run("train", "--config", "folder", "data.root=pics", "data.licence=CC0-1.0", *SMALL)
    flow_map = zoo.load("runs/train/mine")
    assert flow_map.class_names == ("cat", "dog", "owl") and flow_map.shape == (3, 8, 8) and flow_map.data == "folder"
    known = ready(classes).train[0].float() / 127.5 - 1
    assert (flow_map.mean, flow_map.std) == pytest.approx((known.mean().item(), known.std().item()), abs=1e-6)
    card = flow_map.card
    assert card["licence"] == "CC0-1.0" and card["features"] == [] and card["judge"] is None
    readme = Path("runs/train/mine/README.md").read_text()
    assert "license: cc0-1.0" in readme and "none" in readme
    run("sample", "model=runs/train/mine", "label=owl", "n=2", "steps=2", "out=samples")
    run(
        "steer",
        "model=runs/train/mine",
        "label=cat",
        "reward=brightness",
        "n=1",
        "method.particles=2",
        "method.steps=2",
        "out=steered",
    )
    assert Path("samples/grid.png").is_file() and Path("steered/grid.png").is_file()
    run(
        "finetune",
        "model=runs/train/mine",
        "label=dog",
        "reward=brightness",
        "method=direct",
        "batch_size=2",
        *TUNE,
        "out=tuned",
    )
    assert zoo.load("tuned").data == "folder" and zoo.load("tuned").class_names == ("cat", "dog", "owl")
    run("evaluate", "model=runs/train/mine", "n=4", "steps=[1]", "euler=2", "out=measured")
    told = json.loads(Path("measured/result.json").read_text())
    assert told["texture_of_data"] > 0 and any("card.features" in gap for gap in told["gaps"])


@pytest.mark.slow
def test_draws_are_learnt_beside_a_map_that_stays_as_it_is(classes, here):
    """With a rank and objectives of draws only, its weights and jumps are the same bits; also of a run that was continued."""
    folder = ["--config", "folder", "data.root=pics", *SMALL]
    run("train", *folder)
    draws = ["network.posterior=true", "network.posterior_rank=2", "objective.start=0", "init=runs/train/mine", "name=drawn"]
    words = [*folder, *draws, "objective.shares={trajectory: 0, posterior_trajectory: 1}"]
    run("train", *words, "optimizer.steps=2")
    run("train", *words, "optimizer.steps=4")
    plain, drawn = (zoo.load(f"runs/train/{name}") for name in ("mine", "drawn"))
    own, other = (flow_map.body.state_dict() for flow_map in (plain, drawn))
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    x, z = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.jump(x, 0.2, 0.9), drawn.jump(x, 0.2, 0.9))
    assert not torch.equal(drawn.posterior(x, 0.5, z), plain.lookahead(x, 0.5))  # as it began


DOCS = Path(__file__).parents[2] / "docs" / "models.md"
TINY = {
    "data": ["--size", "8"],
    "train": SMALL,
    "sample": ["n=2", "steps=2"],
    "steer": ["n=1", "method.particles=2", "method.steps=2"],
}


def follow_the_page(label: str = "label=cats", *more: str) -> None:
    """Run the first commands of the page, at a small size; its label may be another, and ``more`` goes to the training."""
    section = DOCS.read_text().split("## Your own pictures")[1].split("\n## ")[0]
    assert len(section.splitlines()) <= 40
    commands = [shlex.split(line) for line in re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()]
    assert [words[1] for words in commands] == ["data", "train", "sample", "steer"]
    for _, command, *words in commands:
        asked = [label if word == "label=cats" else word for word in words]
        run(command, *asked, *TINY[command], *(more if command == "train" else ()))
    assert len(list(Path("runs/steer").glob("*/grid.png"))) == 1


@pytest.mark.slow
def test_the_four_commands_of_the_page_give_a_steered_picture(here):
    for seed in range(20):
        save(Path("pictures") / ("cats" if seed % 2 else "dogs") / f"{seed}.png", noise(seed))
    follow_the_page()


@pytest.mark.slow
@pytest.mark.data("emoji")
def test_the_four_commands_run_on_captioned_emoji(tmp_path, monkeypatch):
    from steerfm_zoo.emoji import pictures

    emoji = pictures.load()
    monkeypatch.chdir(tmp_path)
    lines = []
    for row in range(0, 2000, 40):
        save(Path(f"pictures/{row}.png"), emoji.pictures[row].permute(1, 2, 0).numpy())
        lines.append(json.dumps({"file_name": f"{row}.png", "text": emoji.caption(row)}))
    Path("pictures/metadata.jsonl").write_text("\n".join(lines))
    follow_the_page("prompt=red heart", "text=emoji-clip")


@pytest.mark.slow
def test_a_classifier_of_the_folder_is_what_its_map_is_measured_with(here):
    for seed in range(60):
        save(Path(f"pics/{'ab'[seed % 2]}/{seed}.png"), noise(seed, (8, 8, 3)) // 2 + 100 * (seed % 2))
    options = ["data.name=folder", "data.root=pics", "data.held_out=0.4", *SMALL]
    run("train", "task=classifier", *options, "network={name: resnet, widths: [8, 16]}", "name=eyes")
    eyes = "runs/train/eyes/eyes.safetensors"
    judge = f"judge={{name: classifier, model: {eyes}}}"
    run("train", *options, "network={name: unet, widths: [8, 16]}", f"features=[{eyes}]", judge)
    run("evaluate", "model=runs/train/mine", "n=8", "steps=[1]", "euler=2", "out=measured")
    told = json.loads(Path("measured/result.json").read_text())
    assert eyes in told["samplers"]["1 jump"]["spaces"] and "accuracy" in told["samplers"]["1 jump"]


@pytest.mark.slow
def test_captions_are_what_a_map_is_asked_for(captioned, here, capsys):
    train = ["train", "--config", "folder", "data.root=pics", *SMALL]
    assert "text=minilm" in refused(capsys, *train)
    run(*train, "text=emoji-clip")
    run(
        "steer",
        "model=runs/train/mine",
        "prompt=picture number 3",
        "reward=brightness",
        "n=1",
        "method.particles=2",
        "out=steered",
    )
    run("evaluate", "model=runs/train/mine", "n=4", "steps=[1]", "euler=2", "held_out=true", "out=measured")


@pytest.mark.slow
def test_a_training_goes_on_with_the_same_folder_only(captioned, here, capsys):
    train = ["train", "--config", "folder", "data.root=pics", "text=emoji-clip", *SMALL]
    run(*train)
    run(*train, "optimizer.steps=5")
    for file in captioned.glob("*[tl]"):
        file.write_text(file.read_text().replace("number 1", "number one"))
    assert "data folder" in refused(capsys, *train, "optimizer.steps=6")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.size=9"], r"data\.size=8, or take fewer network\.widths"),
        (["data.size=2"], r"data\.size=4, or take fewer network\.widths"),
        (["network.channels=1"], r"network\.channels=3"),
        (["data.sice=8"], r"unknown key 'data\.sice'.*'size'"),
        (["text=emoji-clip"], "has classes: leave out text="),
        (["data.root=nowhere"], r"data\.root=nowhere: no such folder"),
        (["data.root=null"], r"data\.root=pictures/"),
        (["task=contrastive"], "has no captions"),
        (["features=[gone.safetensors]"], r"features: no file gone\.safetensors"),
        (["data.name=fashion"], r"data\.size=8: data 'fashion' has no such key"),
    ],
)
def test_commands_refuse_before_the_work(classes, here, capsys, settings, message):
    said = refused(capsys, "train", "--config", "folder", "data.root=pics", *SMALL, *settings)
    assert re.search(message, said), said
    assert not Path("runs").exists()


@pytest.fixture
def measured(classes, here) -> tuple[Evaluator, Space]:
    """What a map of the folder is measured with, by the features of a file."""
    Path("eyes.py").write_text("def mean(pictures):\n    return pictures.mean((2, 3))\n")
    flow_map = NeuralFlowMap(UNet(3, widths=(8,), classes=3), (3, 8, 8), class_names=("cat", "dog", "owl"))
    flow_map.card = {"data": ready(Path("pics"), held_out=0.5).spec(), "features": ["eyes.py:mean"]}
    evaluator = Evaluator(flow_map)
    return evaluator, evaluator.spaces["eyes.py:mean"]


def test_distances_are_to_the_part_that_is_held_out_and_nothing_is_written_among_the_pictures(measured):
    evaluator, space = measured
    before = sorted(Path("pics").rglob("*"))
    known = evaluator.reference(space)
    held = ready(Path("pics"), held_out=0.5).reference()
    assert known is not None and known.count == len(held)
    assert known.mean.tolist() == pytest.approx(held.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert sorted(Path("pics").rglob("*")) == before and list(Path("cache").rglob("features-*"))


def test_features_are_computed_anew_where_their_file_has_changed(measured):
    evaluator, space = measured
    known = evaluator.reference(space)
    Path("eyes.py").write_text("def mean(pictures):\n    return 1 - pictures.mean((2, 3))\n")
    other = Evaluator(evaluator.flow_map)
    changed = other.reference(Space("eyes.py:mean", lambda pictures: 1 - pictures.mean((2, 3))))
    assert known is not None and changed is not None
    assert changed.mean.tolist() == pytest.approx((1 - known.mean).tolist(), abs=1e-6)


def test_too_few_held_out_pictures_are_a_gap_and_a_folder_that_is_gone_is_named(measured):
    evaluator, space = measured
    evaluator.flow_map.card = {**evaluator.flow_map.card, "data": ready(Path("pics"), held_out=0.01).spec()}
    few = Evaluator(evaluator.flow_map)
    assert few.reference(space) is None and "10 are needed" in few.gaps[0]
    Path("pics").rename("moved")
    with pytest.raises(FileNotFoundError, match=r"pics: no such folder.*its JSON"):
        Evaluator(evaluator.flow_map).reference(space)


def test_the_data_command_says_what_a_folder_holds(classes, here, capsys):
    run("data", "folder", "--root", "pics", "--size", "8")
    said = capsys.readouterr().out
    assert "owl" in said and "held out" in said
    assert "no such folder" in refused(capsys, "data", "folder", "--root", "gone")
