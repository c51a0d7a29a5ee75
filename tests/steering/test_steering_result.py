"""A steering result saves, loads, joins, draws and shows itself; the command writes what `steer` gives."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import steerfm
from steerfm import cli
from steerfm.closed_form import GaussianMixture
from steerfm.flowmap import FlowMap, Guided, Microbatched
from steerfm.report.pictures import picture_grid
from steerfm.rewards import Reward
from steerfm.steering import FeynmanKac, RandomSearch, SteeringResult, Trace, steer, steer_batches


class Blocks(FlowMap):
    """Pictures (c, 4, 4) that are their noise, squashed; takes no network."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__((channels, 4, 4))

    def average_velocity(self, x, s, t, cond=None):
        return x.tanh() - x


class Latent(Blocks):
    """Decodes in a way of its own."""

    def decode(self, z):
        return z.sigmoid()


def bright(images):
    return images.flatten(1).mean(1)


def half(images):
    return images[:, :, :2].flatten(1).mean(1)


TERMS = 2.0 * steerfm.reward(bright) - 0.5 * steerfm.reward(half)
METHOD = FeynmanKac(particles=5, steps=3)


def made(n: int = 4, flow_map: FlowMap | None = None, method=METHOD, **options) -> SteeringResult:
    return steer(flow_map or Blocks(), TERMS, method, n, seeds=3, strength=[2.0, -1.0, 0.0, 5.0, 1.0][:n], **options)


def vectors() -> SteeringResult:
    toy = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], [[0.1, 0.2], [0.1, 0.2]]).flow_map(steps=2)
    return steer(toy, lambda x: x[:, 0], METHOD, 3)


def tensors(result: SteeringResult) -> dict[str, torch.Tensor | None]:
    """Every tensor that a result holds, written out by its fields."""
    named = {name: getattr(result, name) for name in ("samples", "rewards", "log_weights", "log_z", "strength")}
    return named | result.components | {f.name: getattr(result.trace, f.name) for f in fields(Trace)}


def same(a: SteeringResult, b: SteeringResult) -> bool:
    def alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
        return one is other if one is None or other is None else one.dtype == other.dtype and one.equal(other)

    one, other = tensors(a), tensors(b)
    return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())


CASES = {
    "pictures": made,
    "look-aheads": lambda: made(lookaheads=True),
    "colour": lambda: made(flow_map=Blocks(3)),
    "no log Z, another trace": lambda: made(method=RandomSearch(iterations=2)),
    "one output": lambda: made(1),
    "vectors": vectors,
    "an odd name": lambda: replace(made(), components={"a.b / 'ü'\n": torch.rand(4, 5), "trace.t": torch.rand(4, 5)}),
    "types": lambda: replace(made(), samples=made().samples.bfloat16(), rewards=made().rewards.double()),
}


# --- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["a/folder", "a file.safetensors"])
def test_a_saved_result_comes_back_bit_for_bit(tmp_path, case, name):
    result = CASES[case]()
    file = result.save(tmp_path / name)
    assert file == (tmp_path / name if name.endswith("safetensors") else tmp_path / name / "samples.safetensors")
    loaded = SteeringResult.load(tmp_path / name)
    assert same(result, loaded) and loaded.cost == result.cost and repr(loaded) == repr(result)
    assert loaded.images().equal(result.images()) and loaded.best().equal(result.best())
    again = SteeringResult.load(loaded.save(tmp_path / "again"))  # what was loaded saves itself, too
    assert same(again, result) and again.images().equal(result.images())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: Microbatched(x, 2), lambda x: Guided(x, 1.0, torch.tensor(0))])
def test_only_a_map_that_decodes_in_its_own_way_is_missed(tmp_path, wrap):
    result = replace(made(), flow_map=wrap(Latent()))
    file = result.save(tmp_path)
    loaded = SteeringResult.load(file)
    assert same(result, loaded) and loaded.best().equal(result.best()) and "4 of 5 particles" in repr(loaded)
    for needs in (loaded.images, loaded.pil, lambda: loaded.grid(tmp_path / "x.png")):
        with pytest.raises(ValueError, match=r"SteeringResult\.load\(path, flow_map=\.\.\.\)"):
            needs()
    assert loaded._repr_png_() is None and "<img" not in loaded._repr_html_()
    assert SteeringResult.load(file, Latent()).images().equal(result.images())
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*\(3, 4, 4\)"):
        SteeringResult.load(file, Latent(3))


@pytest.mark.parametrize("cut", [0, 5, 300, -1, -400])
def test_a_torn_file_is_refused_in_a_line(tmp_path, cut):
    file = made().save(tmp_path)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="torn") as caught:
        SteeringResult.load(tmp_path)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def foreign(tmp_path):
    """Whole safetensors files that are no results."""
    file = tmp_path / "x.safetensors"
    whole = load_file(made().save(tmp_path / "whole.safetensors"))
    with safe_open(tmp_path / "whole.safetensors", "pt") as opened:
        facts = opened.metadata()
    yield save_file({"samples": torch.ones(2, 3)}, file)
    yield save_file({"samples": torch.ones(2, 3)}, file, {"kind": "another"})
    yield save_file(whole, file)
    yield save_file(whole, file, facts | {"cost": "{}}"})
    yield save_file(whole, file, facts | {"cost": '{"__class__": 1}'})
    yield save_file(whole, file, {name: value for name, value in facts.items() if name != "decode"})
    for name in ("samples", "rewards", "log_weights", "strength", "trace.t", "trace.ess"):
        yield save_file({key: value for key, value in whole.items() if key != name}, file, facts)
        yield save_file(whole | {name: whole[name][:2].clone()}, file, facts)
    yield save_file(whole | {"samples": torch.zeros(())}, file, facts)
    yield save_file(whole | {"rewards": torch.zeros(4, 4)}, file, facts)
    yield save_file(whole | {"trace.more": torch.zeros(4, 4)}, file, facts)


def test_a_foreign_file_is_refused_in_a_line(tmp_path):
    for _ in foreign(tmp_path):
        with pytest.raises(
            ValueError, match=r"is not a steering result: give a file that SteeringResult\.save wrote"
        ) as caught:
            SteeringResult.load(tmp_path / "x.safetensors")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere.samples\.safetensors"):
        SteeringResult.load(tmp_path / "nowhere")


def test_more_tensors_are_kept_beside(tmp_path):
    result = made()
    file = result.save(tmp_path, base=torch.arange(4))
    assert load_file(file)["base"].tolist() == [0, 1, 2, 3] and same(SteeringResult.load(file), result)
    for wrong in ({"samples": torch.zeros(4)}, {"base": torch.zeros(3)}):
        with pytest.raises(ValueError, match="cannot be saved"):
            result.save(tmp_path, **wrong)
    assert same(SteeringResult.load(file), result)


# --- some of the outputs, and more of them ---------------------------------------------------------------------------
def test_what_is_taken_apart_joins_to_the_same():
    result = made(lookaheads=True)
    assert len(result) == 4 and [len(part) for part in result] == [1, 1, 1, 1]
    assert same(SteeringResult.cat(list(result)), result)
    assert same(SteeringResult.cat([result[:1], result[1:]]), result)
    assert SteeringResult.cat([result, result]).cost.forwards == 2 * result.cost.forwards


def test_outputs_are_indexed_as_a_tensor_is():
    result = made()
    for index in (
        slice(1, 3),
        slice(None, None, 2),
        [2, 0],
        [-1],
        torch.tensor([3, 3]),
        torch.tensor([True, False, False, True]),
    ):
        part = result[index]
        assert part.samples.equal(result.samples[index]) and part.trace.value.equal(result.trace.value[:, index])
        assert part.strength.equal(result.strength[index]) and part.trace.t.equal(result.trace.t)
        assert part.images().equal(result.images()[index]) and part.best().equal(result.best()[index])
    numbers: list[Any] = [2, -1, np.int64(1), torch.tensor(0)]
    for index in numbers:
        assert result[index].samples.equal(result.samples[[int(index)]])
    for wrong in (4, -5, slice(4, None), [7]):
        with pytest.raises(IndexError):
            result[wrong]
    with pytest.raises(TypeError, match=r"result\.samples\[\.\.\.\]"):
        result[0, 1]


def test_results_that_do_not_fit_are_not_joined():
    result = made()
    others = [
        made(method=FeynmanKac(particles=4, steps=3)), made(flow_map=Blocks(3)),
        replace(result, components={"bright": result.components["bright"]}),
        replace(result, components=result.components | {"third": result.rewards}),
    ]  # fmt: skip
    for other in others:
        for pair in ((result, other), (other, result)):
            with pytest.raises(ValueError, match="results cannot be joined") as caught:
                SteeringResult.cat(pair)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no results"):
        SteeringResult.cat([])
    without = replace(result, log_z=None)
    assert SteeringResult.cat([result, without]).log_z is None


def test_steer_is_its_batches_joined():
    whole = made(lookaheads=True)
    for size in (1, 3, 4, 9):
        parts = list(
            steer_batches(Blocks(), TERMS, METHOD, 4, seeds=3, strength=[2.0, -1.0, 0.0, 5.0], lookaheads=True, batch_size=size)
        )
        assert [len(part) for part in parts] == [min(size, 4 - begin) for begin in range(0, 4, size)]
        assert same(SteeringResult.cat(parts), whole)
        assert sum(part.cost.forwards for part in parts) == whole.cost.forwards
    some = list(steer_batches(Blocks(), TERMS, METHOD, 4, seeds=3, strength=[2.0, -1.0, 0.0, 5.0], batch_size=1, skip={0, 2}))
    assert same(SteeringResult.cat(some), made()[[1, 3]])
    assert not whole.samples.is_inference() and not whole.trace.value.is_inference()


def test_batches_refuse_before_the_first():
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        steer_batches(Blocks(), bright, METHOD, 4, batch_size=0)


# --- pictures --------------------------------------------------------------------------------------------------------
def test_pil_pictures_are_the_best(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB")):
        result = made(flow_map=Blocks(channels))
        pictures = result.pil()
        assert [picture.mode for picture in pictures] == [mode] * 4 and pictures[0].size == (4, 4)
        shown = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]) / 255
        best = result.images()[range(4), result.best_index()]
        assert np.abs(shown - best.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6
    assert made(flow_map=Blocks(2)).pil()[0].size == (8, 4)  # side by side
    with pytest.raises(ValueError, match=r"\(2,\), not a picture"):
        vectors().pil()


def test_a_grid_shows_the_particles_by_reward(tmp_path, monkeypatch):
    grids = []
    draw = picture_grid
    monkeypatch.setattr("steerfm.report.pictures.picture_grid", lambda *given: (grids.append(given), draw(*given))[1])
    result = made()
    upwards = result.rewards.sort(dim=1, descending=True)
    order = upwards.indices
    order[1] = order[1].flip(0)  # strength -1: the lowest is the best
    result.grid(tmp_path / "new" / "all.png", particles=3)
    pictures, _, labels, captions, title = grids.pop()
    for output in range(4):
        assert pictures[output].equal(result.images()[output, order[output, :3]])
        assert captions[output] == [f"{value:.4g}" for value in result.rewards[output, order[output, :3]].tolist()]
    assert labels == [f"output {output}" for output in range(4)] and "bright" in title and "half" in title
    result.grid(tmp_path / "x.png", columns=3)
    pictures, _, labels, captions, _ = grids.pop()
    assert pictures.shape[:2] == (2, 3) and pictures[1, 1:].eq(1).all() and not labels
    best = result.images()[range(4), result.best_index()]
    assert pictures.flatten(0, 1)[:4].equal(best) and captions[1] == [f"output 3\n{result.rewards[3].max():.4g}", "", ""]
    for options, columns in (({}, 4), ({"columns": 2}, 2), ({"columns": 9}, 4), ({"particles": 5}, 5)):
        width = Image.open(result.grid(tmp_path / "x.png", **options)).convert("RGB").size[0]
        assert columns * 118 <= width < columns * 118 + 118
    for wrong in ({"particles": 0}, {"particles": 6}, {"columns": 0}):
        with pytest.raises(ValueError):
            result.grid(tmp_path / "y.png", **wrong)
    with pytest.raises(ValueError, match="not a picture"):
        vectors().grid(tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


def test_a_grid_of_many_outputs_stays_a_picture(tmp_path):
    result = made(1)[[0] * 300]
    assert Image.open(result.grid(tmp_path / "x.png")).convert("RGB").size[1] < 2000
    assert Image.open(result[:30].grid(tmp_path / "x.png")).convert("RGB").size[1] < 1000


# --- for people ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_a_result_prints_in_a_short_screen(case):
    result = CASES[case]()
    text = repr(result)
    assert text == str(result) and text.count("\n") < 14 and max(map(len, text.splitlines())) <= 140 and "tensor" not in text
    n, k, *shape = result.samples.shape
    best = result.rewards[range(n), result.best_index()].mean()
    ess = (1 / (result.log_weights.double().exp().square().sum(1) * k)).mean()
    for fact in (
        f"{n} of {k} particles", str(tuple(shape)), f"mean {result.rewards.mean():.4g}", f"best {best:.4g}", f"{ess:.0%}",
        f"{result.cost.forwards:,} forwards",
    ):  # fmt: skip
        assert fact in text


def test_a_result_shows_itself_in_a_notebook(tmp_path):
    result = replace(made(), components={"<b>": torch.zeros(4, 5), "x": torch.zeros(4, 5)})
    page = result._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and 'src="data:image/png;base64,' in page
    (tmp_path / "x.png").write_bytes(result._repr_png_())
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
    assert vectors()._repr_png_() is None and "<img" not in vectors()._repr_html_()


def test_cost_prints_what_was_spent():
    cost = steerfm.Cost(forwards=1200, reward_calls=3, seconds=1.5, peak_bytes=3 * 2**20)
    assert str(cost) == "1,200 forwards, 3 reward calls, 1.50 s, 3 MiB"
    assert str(cost + steerfm.Cost(peak_bytes=1234 * 2**20)).endswith(", 1.2 GiB")


# --- the command -----------------------------------------------------------------------------------------------------
COMMAND = [
    "steer", "reward=[{name: brightness}, {name: symmetry}]", "method=feynman_kac", "method.particles=3", "method.steps=2",
    "strength=20", "seeds=5",
]  # fmt: skip


def test_the_command_writes_what_steer_gives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*COMMAND, "judge=null", "n=5", "batch_size=2", "out=run"]) == 0
    terms = steerfm.reward("brightness") + steerfm.reward("symmetry")
    fm = steerfm.load("fashion")
    expected = steer(fm, terms, FeynmanKac(particles=3, steps=2), 5, seeds=5, strength=20.0, lookaheads=True, batch_size=2)
    loaded = SteeringResult.load("run")
    assert same(loaded, expected) and loaded.cost.forwards == expected.cost.forwards
    assert loaded.grid("again.png").is_file()
    assert load_file("run/samples.safetensors")["base"].shape == (5, 1, 28, 28)
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    best = expected.rewards[range(5), expected.best_index()]
    assert told["reward_best"] == pytest.approx(best.mean().item(), rel=1e-6)
    assert told["cost"]["forwards"] == expected.cost.forwards


@pytest.mark.parametrize("groupwise", [False, True])
def test_no_picture_is_scored_twice(tmp_path, monkeypatch, groupwise):
    """The samples of the method, and the plain ones; the best again only by a reward that compares outputs."""
    monkeypatch.chdir(tmp_path)
    seen = []
    promise = Reward.promise  # what every score goes through
    monkeypatch.setattr(Reward, "promise", lambda self, x, *a, **k: (seen.append(len(x)), promise(self, x, *a, **k))[1])
    reward = "diversity" if groupwise else "brightness"
    best_of = ["method=best_of_n", "method.particles=3", "method.steps=1"]
    assert cli.main(["steer", f"reward={reward}", *best_of, "judge=null", "n=5", "batch_size=2", "out=run"]) == 0
    assert sum(seen) == 5 * 3 + 5 + (5 if groupwise else 0)


@pytest.mark.slow
def test_a_finished_batch_is_not_steered_again_and_a_torn_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "judge=null", "n=6", "batch_size=2"]
    assert cli.main([*command, "out=whole"]) == 0
    with monkeypatch.context() as patch:
        broken = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
        patch.setattr("steerfm.report.run_folder.RunFolder.merge_parts", broken)
        assert cli.main([*command, "out=run"]) == 130
    parts = sorted((tmp_path / "run" / "parts").glob("*.safetensors"))
    assert len(parts) == 3 and all(len(SteeringResult.load(part)) == 2 for part in parts)
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    parts[2].unlink()
    steered = []
    run = FeynmanKac.run
    monkeypatch.setattr(FeynmanKac, "run", lambda self, *a: (steered.append(a[2]), run(self, *a))[1])
    assert cli.main([*command, "out=run"]) == 0
    assert steered == [2, 2] and not (tmp_path / "run" / "parts").exists()
    a, b = (load_file(tmp_path / name / "samples.safetensors") for name in ("whole", "run"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    a, b = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run"))
    for told in (a, b):
        del told["command"], told["cost"]["seconds"], told["cost"]["peak_bytes"]
    assert a == b
