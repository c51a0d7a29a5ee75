"""Picture files: transparency, depth, orientation and size, against exact values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kinds import a
from PIL import Image
from steerfm_rewards.inverse import TargetImage

import steerfm
from steerfm.rewards import RewardError

RED = (200, 40, 10)


def truth(path, **arguments):
    picture = steerfm.reward("target_image", target=str(path), **arguments).truth
    assert picture is not None and picture.dtype == torch.float32
    return picture


def over(alpha: float, ground: float, colour=RED):
    return torch.tensor([alpha * value / 255 + (1 - alpha) * ground for value in colour])


def quarter(mode: str, clear, full) -> Image.Image:
    """4 x 4, the upper left pixel ``full``, the others ``clear``."""
    picture = Image.new(mode, (4, 4), clear)
    picture.putpixel((0, 0), full)
    return picture


def test_colours_lie_on_white_unless_told(tmp_path):
    file = tmp_path / "a.png"
    quarter("RGBA", (0, 0, 0, 0), (*RED, 51)).save(file)
    for ground in (None, 1.0, 0.0, 0.5):
        picture = truth(file, ground=ground)
        behind = 1.0 if ground is None else ground
        assert picture.shape == (3, 4, 4)
        torch.testing.assert_close(picture[:, 0, 0], over(0.2, behind))
        torch.testing.assert_close(picture[:, 1, 1], torch.full((3,), behind))
    for wrong in (-0.1, 1.5):
        with pytest.raises(RewardError, match="ground"):
            truth(file, ground=wrong)


def test_greys_lie_on_black_as_those_of_fashion_do(tmp_path):
    quarter("LA", (255, 0), (200, 51)).save(tmp_path / "a.png")
    picture = truth(tmp_path / "a.png")
    assert picture.shape == (1, 4, 4) and picture[0, 1, 1] == 0
    assert picture[0, 0, 0].item() == pytest.approx(0.2 * 200 / 255)
    assert truth(tmp_path / "a.png", ground=1.0)[0, 1, 1] == 1


@pytest.mark.parametrize("form", ["png", "gif", "webp"])
def test_palettes_with_transparency(tmp_path, form):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([*RED, 9, 9, 9])
    picture.putpixel((0, 0), 0)
    file = tmp_path / f"a.{form}"
    if form == "webp":
        quarter("RGBA", (0, 0, 0, 0), (*RED, 255)).save(file, lossless=True)
    else:
        picture.save(file, transparency=1)
    found = truth(file)
    torch.testing.assert_close(found[:, 0, 0], over(1.0, 1.0))
    torch.testing.assert_close(found[:, 2, 2], torch.ones(3))


def test_a_transparent_colour_and_a_transparent_grey(tmp_path):
    quarter("RGB", (1, 2, 3), RED).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    found = truth(tmp_path / "rgb.png")
    torch.testing.assert_close(found[:, 1, 1], torch.ones(3))
    torch.testing.assert_close(found[:, 0, 0], over(1.0, 1.0))
    quarter("L", 7, 200).save(tmp_path / "l.png", transparency=7)
    found = truth(tmp_path / "l.png", ground=0.5)
    assert found.shape == (1, 4, 4) and found[0, 1, 1] == 0.5
    assert found[0, 0, 0].item() == pytest.approx(200 / 255)


@pytest.mark.parametrize("form", ["png", "tif"])
def test_sixteen_bits_keep_their_depth(tmp_path, form):
    ramp = np.linspace(0, 65535, 64).round().reshape(8, 8).astype(np.uint16)
    file = tmp_path / f"a.{form}"
    Image.fromarray(ramp).save(file)
    found = truth(file)
    torch.testing.assert_close(found, torch.from_numpy(ramp / 65535).float()[None])
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "i.tif")
    torch.testing.assert_close(truth(tmp_path / "i.tif"), found)


def test_numbers_with_a_point_are_in_the_range_or_refused(tmp_path):
    values = np.linspace(0, 1, 16).reshape(4, 4).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    torch.testing.assert_close(truth(tmp_path / "a.tif")[0], torch.from_numpy(values))
    for name, wrong in {"f": 255 * values, "i": (1e6 * values).astype(np.int32)}.items():
        Image.fromarray(wrong).save(tmp_path / f"{name}.tif")
        with pytest.raises(RewardError) as error:
            truth(tmp_path / f"{name}.tif")
        assert "\n" not in str(error.value)


def test_grey_bilevel_and_other_colour_spaces(tmp_path):
    quarter("L", 100, 200).save(tmp_path / "l.png")
    assert truth(tmp_path / "l.png").shape == (1, 4, 4)
    quarter("1", 0, 1).save(tmp_path / "1.png")
    assert truth(tmp_path / "1.png").flatten().tolist() == [1.0] + [0.0] * 15
    quarter("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    found = truth(tmp_path / "c.tif")
    assert found[:, 0, 0].tolist() == [1.0, 0.0, 0.0] and found[:, 1, 1].tolist() == [1.0, 1.0, 1.0]


def test_the_orientation_of_a_photograph(tmp_path):
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    found = truth(tmp_path / "a.png")
    assert found.shape == (3, 4, 2) and found[:, 0, 1].tolist() == [1.0, 1.0, 1.0] and found.sum() == 3


def test_a_file_is_resized_by_averages_and_never_distorted(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert truth(tmp_path / "a.png").shape == (3, 64, 64)
    small = truth(tmp_path / "a.png", size=8)
    assert small.shape == (3, 8, 8)
    assert small.mean().item() == pytest.approx(pixels.mean() / 255, abs=0.01)
    assert small.std() < 0.5 * truth(tmp_path / "a.png").std()  # a pixel is an average, not one of the 64 that it covers
    assert truth(tmp_path / "a.png", size=[16, 16]).shape == (3, 16, 16)
    Image.fromarray(pixels[:40]).save(tmp_path / "wide.png")
    with pytest.raises(RewardError, match=r"size=8 for a target of 40 x 64"):
        truth(tmp_path / "wide.png", size=8)
    assert truth(tmp_path / "wide.png", size=[5, 8]).shape == (3, 5, 8)
    with pytest.raises(RewardError, match="size="):  # another size than the model's is refused and names the argument
        steerfm.reward("target_image", target=str(tmp_path / "a.png"))(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("content", [b"", b"words", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", None, "cut", "folder"])
def test_a_broken_or_missing_file_is_one_line(tmp_path, content):
    file = tmp_path / "a.png"
    if content == "folder":
        file.mkdir()
    elif content == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:2000])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    for what in ("target", "mask"):
        good = torch.rand(3, 4, 4)
        with pytest.raises(RewardError, match=f"cannot read its {what}") as error:
            steerfm.reward("target_image", operator="inpaint", **{"target": good, "mask": good, what: str(file)})
        assert "\n" not in str(error.value)


def test_a_mask_is_unknown_where_it_is_transparent(tmp_path):
    quarter("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)).save(tmp_path / "m.png")
    reward = steerfm.reward("target_image", target=torch.zeros(1, 4, 4), operator="inpaint", mask=str(tmp_path / "m.png"))
    assert a(TargetImage, reward).y.numel() == 1
