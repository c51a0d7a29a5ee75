"""Training through Lightning: a run killed and continued must equal the run that was left alone."""

from __future__ import annotations

import gc
import math
import os
import signal
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from kinds import sure
from torch.utils.data import DataLoader

from steerfm import encoders
from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import ResNet, UNet
from steerfm.randomness import stream
from steerfm.signals import Stopped, raised
from steerfm.training import (
    ClassifierTraining,
    FlowMapTraining,
    Metrics,
    NothingTrainedError,
    RobustTraining,
    SampleGrid,
    check_trained,
    fit,
    history,
)  # fmt: skip
from steerfm.training.objectives import FlowMatching, Lagrangian, Progressive, Trajectory

STEPS = 12
QUICK: dict[str, Any] = {"accelerator": "cpu", "log_every": 1, "validate_every": 4, "save_every": 3, "progress": False}


class Pictures(L.LightningDataModule):
    """One batch of 8 x 8 pictures, dark or bright, over and over: the order cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        labels = torch.arange(8) % 2
        noise = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.batch = (0.2 * noise + 0.8 * labels[:, None, None, None], labels)
        self.started_at: list[int] = []

    def batches(self, n: int) -> Any:  # a list is a data set, too, but not by its type
        return [self.batch] * n

    def train_dataloader(self) -> DataLoader:
        self.started_at.append(sure(self.trainer).global_step)
        return DataLoader(self.batches(1000), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.batches(2), batch_size=None)


class Watch(L.Callback):
    """The weights and their average after each step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.averages: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module: Any, outputs, batch, batch_idx) -> None:
        self.weights.append(flat(pl_module.network))
        self.averages.append(flat(pl_module.ema))


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def module(kind: type = FlowMapTraining, off_diagonal=None, **options) -> FlowMapTraining:
    torch.manual_seed(0)
    flow_map = NeuralFlowMap(UNet(1, widths=(8,), classes=2, attention=False), (1, 8, 8), std=0.8)
    off_diagonal = {Lagrangian(): 0.25, Progressive(): 0.25} if off_diagonal is None else off_diagonal
    options = {"steps": STEPS, "warmup": 4, "lr": 1e-2, "start": 0.25, "null": torch.tensor([2])} | options
    return kind(flow_map, off_diagonal, **options)


class KilledError(Exception):
    pass


class Fragile(FlowMapTraining):
    """Dies when it is about to take step 8."""

    def training_step(self, batch, batch_index):
        if self.global_step == 8:
            raise KilledError
        return super().training_step(batch, batch_index)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """A run of 12 steps that was left alone."""
    folder, trained, data = tmp_path_factory.mktemp("whole"), module(), Pictures()
    trainer = fit(trained, data, folder, callbacks=[SampleGrid(folder / "samples", 6)], **QUICK)
    return SimpleNamespace(folder=folder, module=trained, data=data, trainer=trainer)


@pytest.fixture(scope="module")
def continued(tmp_path_factory) -> SimpleNamespace:
    """The same run, killed after 8 steps (the last checkpoint is of step 6) and continued elsewhere with the same command."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(KilledError):
        fit(module(Fragile), Pictures(), folder, **QUICK)
    before = history(folder)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    folder = folder.rename(folder.with_name("moved"))
    trained, data = module(), Pictures()
    trainer = fit(trained, data, folder, **QUICK)
    return SimpleNamespace(folder=folder, module=trained, data=data, trainer=trainer, before=before, checkpoint=checkpoint)


# --- a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_writes_its_folder(whole):
    assert whole.trainer.global_step == STEPS
    assert (whole.folder / "checkpoints" / "last.ckpt").is_file()
    assert sorted(path.name for path in (whole.folder / "samples").iterdir()) == ["0000006.png", "0000012.png"]
    logged = history(whole.folder)
    assert logged["train/loss"][0] == list(range(STEPS))
    assert logged["train/FlowMatching"][0] == list(range(STEPS))
    assert logged["train/Lagrangian"][0] == logged["train/Progressive"][0] == list(range(3, STEPS))  # start = 0.25
    assert logged["val/flow_matching"][0] == [3, 7, 11, STEPS]  # and once at the end
    assert logged["train/skipped"][1] == [0.0] * STEPS
    assert all(math.isfinite(value) for _, values in logged.values() for value in values)


def test_training_lowers_the_loss(whole):
    losses = history(whole.folder)["val/flow_matching"][1]
    assert losses[-1] < losses[0]


def test_a_checkpoint_is_a_plain_state(whole):
    """No pickled objects; the average is in it."""
    checkpoint = torch.load(whole.folder / "checkpoints" / "last.ckpt", weights_only=True)
    names = checkpoint["state_dict"].keys()
    network = {name for name in names if name.startswith("network.")}
    assert {name.replace("average.module.", "network.") for name in names if name.startswith("average.module.")} == network
    assert names - network - {f"average.module.{name[8:]}" for name in network} == {"average.n_averaged"}
    assert checkpoint["state_dict"]["average.n_averaged"] == STEPS
    assert checkpoint["global_step"] == STEPS


def test_the_average_follows_its_rule():
    trained, watch = module(ema=0.35), Watch()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, callbacks=[watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(trained, Pictures())
    average = watch.weights[0].double()
    assert torch.equal(watch.averages[0], watch.weights[0])
    for n in range(1, STEPS):
        d = min(0.35, (1 + n) / (10 + n))
        average = d * average + (1 - d) * watch.weights[n].double()
        torch.testing.assert_close(watch.averages[n].double(), average, rtol=1e-5, atol=1e-6)
    assert min(0.35, 2 / 11) < 0.35 == min(0.35, STEPS / (9 + STEPS))  # both branches were taken
    assert not torch.equal(flat(trained.ema), flat(trained.network))


def test_the_averaged_map(whole):
    (flow_map,) = whole.module.flow_map
    averaged = whole.module.averaged()
    assert torch.equal(flat(averaged.network), flat(whole.module.ema))
    assert torch.equal(flat(flow_map.network), flat(whole.module.network))  # the map in training is as it was
    assert averaged.network is not flow_map.network
    assert (averaged.mean, averaged.std, averaged.shape) == (flow_map.mean, flow_map.std, flow_map.shape)
    assert not averaged.network.training
    x = torch.randn(2, 1, 8, 8)
    assert averaged.jump(x, 0.0, 1.0).shape == x.shape


def test_validation_is_on_the_average_and_repeatable(whole):
    value = whole.trainer.callback_metrics["val/flow_matching"].item()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (again,) = trainer.validate(whole.module, whole.data, verbose=False)
    assert again["val/flow_matching"] == pytest.approx(value, rel=1e-6)


# --- killed and continued --------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_logged(whole, continued):
    expected = history(whole.folder)
    assert continued.before["train/loss"] == (list(range(8)), expected["train/loss"][1][:8])
    after = history(continued.folder)
    assert after.keys() == expected.keys()
    for name, (steps, values) in expected.items():
        assert after[name][0] == steps, name
        assert after[name][1] == pytest.approx(values, rel=1e-5), name


def test_a_continued_run_starts_at_its_checkpoint(continued):
    assert continued.checkpoint["global_step"] == 6
    assert continued.checkpoint["state_dict"]["average.n_averaged"] == 6
    assert continued.data.started_at == [6]
    assert continued.trainer.global_step == STEPS


def test_a_continued_run_gives_the_same_bits(whole, continued):
    assert torch.equal(flat(continued.module.network), flat(whole.module.network))
    assert torch.equal(flat(continued.module.ema), flat(whole.module.ema))


def test_one_last_checkpoint_however_often_it_was_started(continued):
    folder = continued.folder / "checkpoints"
    assert [path.name for path in folder.glob("last*")] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == STEPS


def test_a_run_that_died_leaves_the_global_random_state_alone(tmp_path):
    """At once, and when its module is collected: that may be in the middle of another run's first weights."""
    died = module(Fragile)
    with pytest.raises(KilledError):
        fit(died, Pictures(), tmp_path, **QUICK)
    assert not torch.equal(torch.get_rng_state(), stream(died.seed, "dropout", 8).get_state())
    state = torch.manual_seed(7).get_state()
    del died
    gc.collect()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_finished_run_stays_finished_and_can_go_on(tmp_path):
    """7 steps with a checkpoint every 3: the end is saved too."""
    first = module(steps=7)
    fit(first, Pictures(), tmp_path, **QUICK)
    again = module(steps=7)
    assert fit(again, Pictures(), tmp_path, **QUICK).global_step == 7
    assert torch.equal(flat(again.network), flat(first.network))
    assert torch.equal(flat(again.ema), flat(first.ema))
    longer = module(steps=9)
    assert fit(longer, Pictures(), tmp_path, **QUICK).global_step == 9
    assert history(tmp_path)["train/loss"][0] == list(range(9))


# --- the log ---------------------------------------------------------------------------------------------------------
def test_history_merges_runs(tmp_path):
    """The second start repeats step 1, the third step 3."""
    for lines in (
        [(0, {"loss": 9.0}), (1, {"loss": 8.0})],
        [(1, {"loss": 7.0}), (2, {"val": 0.5}), (3, {"loss": 5.0})],
        [(3, {"loss": 4.0}), (4, {"loss": math.nan})],
    ):
        log = Metrics(tmp_path)
        for step, numbers in lines:
            log.log_metrics(numbers, step)
    merged = history(tmp_path)
    assert merged.keys() == {"loss", "val"}
    assert merged["val"] == ([2], [0.5])
    assert merged["loss"][0] == [0, 1, 3, 4]
    assert merged["loss"][1][:3] == [9.0, 7.0, 4.0]
    assert math.isnan(merged["loss"][1][3])


def test_a_folder_without_a_log_has_no_history(tmp_path):
    assert history(tmp_path) == {}


# --- one step --------------------------------------------------------------------------------------------------------
class Poisoned(FlowMapTraining):
    """The losses of steps 2 and 5 are infinite and not a number."""

    def training_step(self, batch, batch_index):
        return super().training_step(batch, batch_index) * {2: math.inf, 5: math.nan}.get(self.global_step, 1.0)


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path):
    trained, watch = module(Poisoned, weight_decay=0.1, steps=8), Watch()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=8, callbacks=[watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(trained, Pictures())
    moved = [not torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:])]
    assert moved == [step not in (2, 5) for step in range(1, 8)]
    assert trained.skipped == 2
    assert all(weights.isfinite().all() for weights in [*watch.weights, flat(trained.ema)])
    assert trainer.callback_metrics["train/skipped"] == 2
    checkpoint: dict = {}
    trained.on_save_checkpoint(checkpoint)
    restored = module()
    restored.on_load_checkpoint(checkpoint)
    assert restored.skipped == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 100, "warmup": 10, "decay": 0.2}, {0: 0.1, 4: 0.5, 9: 1, 50: 1, 80: 1, 90: 0.5, 95: 0.25, 100: 0}),
        ({"steps": 10, "warmup": 0, "decay": 0.0}, {0: 1, 5: 1, 9: 1, 10: 0}),
        ({"steps": 10, "warmup": 0, "decay": 1.0}, {0: 1, 5: 0.5, 9: 0.1}),
        ({"steps": 10, "warmup": 1, "decay": 0.5}, {0: 1, 5: 1, 6: 0.8, 20: 0}),
    ],
)
def test_learning_rates(options, expected):
    trained = module(lr=0.02, **options)
    configured = trained.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = {}
    for step in range(max(expected) + 1):
        rates[step] = optimizer.param_groups[0]["lr"] / 0.02
        optimizer.step()
        schedule.step()
    assert {step: rates[step] for step in expected} == pytest.approx(expected)


def test_only_the_network_is_optimised():
    trained = module(betas=(0.8, 0.95), weight_decay=0.3)
    (group,) = trained.configure_optimizers()["optimizer"].param_groups
    assert sum(p.numel() for p in group["params"]) == flat(trained.network).numel()
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.3)
    assert not any(p.requires_grad for p in trained.ema.parameters())


class Recorder:
    """An objective whose loss is a constant, and which remembers its rows."""

    def __init__(self, loss: float) -> None:
        self.loss, self.calls = loss, []

    def __call__(self, flow_map, x1, cond, generator):
        self.calls.append((x1, cond))
        return torch.full((len(x1),), self.loss)


def one_step(shares: dict[float, float], n: int = 8, **options: Any):
    """(loss, diagonal, off-diagonal recorders) of one training step on n pictures; the losses are the keys of shares."""
    diagonal, recorders = Recorder(1.0), [Recorder(loss) for loss in shares]
    off_diagonal = dict(zip(recorders, shares.values()))
    given: dict[str, Any] = {"start": 0.0} | options
    trained = module(off_diagonal=off_diagonal, diagonal=diagonal, **given)
    trained.generator.manual_seed(0)
    pictures = torch.linspace(0, 1, n)[:, None, None, None].expand(n, 1, 8, 8)
    return trained.training_step((pictures, torch.arange(n) % 2), 0), diagonal, recorders


def test_shares_are_weights_and_rows_are_used_once():
    loss, diagonal, recorders = one_step({10.0: 0.25, 100.0: 0.5})
    assert loss.item() == pytest.approx(0.25 * 1 + 0.25 * 10 + 0.5 * 100)
    rows = torch.cat([x1[:, 0, 0, 0] for recorder in (*recorders, diagonal) for x1, _ in recorder.calls])
    torch.testing.assert_close(rows, torch.linspace(-1, 1, 8))  # in model space
    assert [len(recorder.calls[0][0]) for recorder in (*recorders, diagonal)] == [2, 4, 2]


@pytest.mark.parametrize(
    ("shares", "n", "sizes"), [({10.0: 1.0}, 8, [8, 0]), ({10.0: 0.1}, 4, [0, 4]), ({10.0: 0.5, 100.0: 0.5}, 4, [2, 2, 0])]
)
def test_objectives_without_rows_are_not_called(shares, n, sizes):
    loss, diagonal, recorders = one_step(shares, n)
    assert [sum(len(x1) for x1, _ in recorder.calls) for recorder in (*recorders, diagonal)] == sizes
    assert [len(recorder.calls) for recorder in (*recorders, diagonal)] == [int(size > 0) for size in sizes]
    assert loss.isfinite()


def test_flow_matching_alone_at_the_start():
    loss, diagonal, (recorder,) = one_step({10.0: 0.5}, start=0.1)
    assert loss.item() == 1.0
    assert not recorder.calls
    assert len(diagonal.calls[0][0]) == 8


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match=r"1\.2"):
        module(off_diagonal={Lagrangian(): 0.6, Progressive(): 0.6})


def test_labels_become_the_null_class():
    for drop, expected in ((0.0, [0, 1] * 4), (1.0, [2] * 8)):
        _, diagonal, _ = one_step({}, drop=drop)
        assert diagonal.calls[0][1].tolist() == expected
    _, diagonal, _ = one_step({}, n=2000, drop=0.3)
    dropped = (diagonal.calls[0][1] == 2).float().mean().item()
    assert dropped == pytest.approx(0.3, abs=4 * (0.21 / 2000) ** 0.5)
    assert one_step({}, null=None)[1].calls[0][1] is None


def test_the_noise_has_a_seed(whole):
    losses = []
    for seed in (0, 0, 1):
        trained = module(off_diagonal={}, diagonal=FlowMatching(), seed=seed)
        trained.on_train_start()
        losses.append(trained.training_step(whole.data.batch, 0).item())
    assert losses[0] == losses[1] != losses[2]


# --- classifiers -----------------------------------------------------------------------------------------------------
def test_training_a_classifier(tmp_path):
    torch.manual_seed(0)
    trained = ClassifierTraining(
        ResNet(1, widths=(8,), classes=2, dropout=0.0), noise=0.05, steps=30, warmup=2, lr=0.02, ema=0.8
    )
    data = Pictures()
    fit(trained, data, tmp_path, **dict(QUICK, validate_every=30, save_every=30))
    logged = history(tmp_path)
    assert logged["train/loss"][1][-1] < 0.5 * logged["train/loss"][1][0]
    assert logged["val/accuracy"] == ([29, 30], [1.0, 1.0])
    assert (trained.ema(data.batch[0]).argmax(1) == data.batch[1]).all()


# --- image-text models -----------------------------------------------------------------------------------------------
SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
STRAIGHT = encoders.Preprocessing((32, 32), [0.5] * 3, [0.5] * 3, eight_bits=False)


def robust(**options):
    torch.manual_seed(0)
    network = encoders.build(SMALL_CLIP)
    teacher: Any = encoders.build(SMALL_CLIP).eval()
    embed = torch.no_grad()(lambda x: teacher.encode_image(STRAIGHT(x), normalize=True))
    words = encoders.tokenizer(SMALL_CLIP)
    return RobustTraining(network, words, STRAIGHT, embed, radius=0.5, **options), torch.rand(12, 3, 32, 32)


def test_the_worst_change_is_short_and_worse_than_a_random_one():
    trained, pictures = robust()
    goal = trained.teacher(pictures)
    before = trained._distance(pictures, goal).sum().item()
    rises, random = [], []
    for seed in range(8):
        trained.generator.manual_seed(seed)
        radius = 0.5 * torch.rand(12, 1, 1, 1, generator=trained.generator)
        change = torch.randn(pictures.shape, generator=trained.generator)
        change = change * radius / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        random.append(trained._distance((pictures + change).clamp(0, 1), goal).sum().item() - before)
        trained.generator.manual_seed(seed)
        worst = trained._worst(pictures, goal)
        assert ((worst - pictures).flatten(1).norm(dim=1) <= radius.flatten() + 1e-5).all()
        assert worst.min() >= 0 and worst.max() <= 1
        rises.append(trained._distance(worst, goal).sum().item() - before)
    assert min(rises) > 3 * max(map(abs, random)) and all(p.grad is None for p in trained.network.parameters())


def test_a_robust_training_nears_its_teacher_and_leaves_the_text_tower(monkeypatch):
    """Half of each batch are the samples, of which the data hold none."""
    samples = torch.rand(6, 3, 32, 32).round()
    trained, pictures = robust(samples=samples, lr=0.01, steps=40, warmup=1)
    text = {k: v.clone() for k, v in trained.network.state_dict().items() if not k.startswith("visual.")}
    monkeypatch.setattr(trained, "log", lambda *_, **__: None)
    seen = []
    teacher = trained.teacher
    trained.teacher = lambda x: seen.append(x) or teacher(x)
    before = trained._distance(samples, teacher(samples)).mean().item()
    optimizer = trained.configure_optimizers()["optimizer"]
    for _ in range(40):
        optimizer.zero_grad()
        trained.training_step((pictures, [""] * 12, torch.arange(12)), 0).backward()
        optimizer.step()
    assert trained._distance(samples, teacher(samples)).mean().item() < 0.3 * before
    assert all(len(x) == 12 and (x[:6] == pictures[6:]).all() for x in seen)
    assert all((row == samples).flatten(1).all(1).any() for row in seen[0][6:])
    after = trained.network.state_dict()
    assert all((after[k] == v).all() for k, v in text.items())


# --- what is not trained, torn checkpoints, signals --------------------------------------------------------------------
@pytest.mark.slow
def test_the_pool_of_trajectories_is_part_of_a_checkpoint(tmp_path):
    def run(folder, kind=FlowMapTraining):
        trained = module(kind, {Trajectory(keep=12, uses=3): 0.5}, start=0.0)
        fit(trained, Pictures(), folder, **QUICK)
        return trained

    left_alone = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", Fragile)
    assert torch.equal(flat(run(tmp_path / "killed").network), flat(left_alone.network))


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, whole, content):
    with pytest.raises(KilledError):
        fit(module(Fragile), Pictures(), tmp_path, **QUICK)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100] if content is None else content)
    trained, data = module(), Pictures()
    fit(trained, data, tmp_path, **QUICK)
    assert data.started_at == [3] and "previous.ckpt" in capsys.readouterr().err
    assert torch.equal(flat(trained.network), flat(whole.module.network))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    real = torch.save

    def full(checkpoint, path):
        if checkpoint["global_step"] == 6:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        real(checkpoint, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written"):
        fit(module(), Pictures(), tmp_path, **QUICK)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


class Signalled(FlowMapTraining):
    """Gets a signal in the middle of step 7."""

    number = signal.SIGTERM

    def optimizer_step(self, *arguments, **options):
        if self.global_step == 7:
            os.kill(os.getpid(), self.number)
        super().optimizer_step(*arguments, **options)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_two_steps(tmp_path, whole, number):
    stopped = module(Signalled)
    stopped.number = number
    with pytest.raises(Stopped) as caught:
        fit(stopped, Pictures(), tmp_path, **QUICK)
    assert caught.value.number == number and "step 8" in caught.value.where
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == checkpoint["state_dict"]["average.n_averaged"] == 8
    trained = module()
    fit(trained, Pictures(), tmp_path, **QUICK)
    assert torch.equal(flat(trained.network), flat(whole.module.network))
    assert torch.equal(flat(trained.ema), flat(whole.module.ema))
    assert not lost(whole.folder, tmp_path)  # step 8 is logged and validated before it stops


def lost(whole, folder) -> list[tuple[str, int, float, float | None]]:
    """Logged numbers of a run that was left alone which another does not have."""
    expected, after = history(whole), history(folder)
    found = {name: dict(zip(*after.get(name, ([], [])))) for name in expected}
    pairs = [(name, step, value) for name, row in expected.items() for step, value in zip(*row)]
    return [(name, step, value, found[name].get(step)) for name, step, value in pairs if found[name].get(step) != value]


class DiesInValidation(FlowMapTraining):
    """At the step of a checkpoint."""

    def validation_step(self, batch, batch_index):
        if self.global_step == 8:
            raise KilledError
        super().validation_step(batch, batch_index)


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, 8])
def test_a_kill_in_the_validation_loses_no_line(tmp_path, whole, every):
    options = QUICK | {"save_every": every}
    with pytest.raises(KilledError):
        fit(module(DiesInValidation), Pictures(), tmp_path, **options)
    fit(module(), Pictures(), tmp_path, **options)
    assert not lost(whole.folder, tmp_path)


class SignalledAtTheEnd(FlowMapTraining):
    """Gets a signal in the validation after the last step."""

    number = signal.SIGTERM

    def validation_step(self, batch, batch_index):
        if self.trainer.state.fn == "validate":
            os.kill(os.getpid(), self.number)
        super().validation_step(batch, batch_index)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_validation_is_no_exit_of_lightnings(tmp_path, number):
    """Lightning ends the process with 1 at a KeyboardInterrupt."""
    stopped = module(SignalledAtTheEnd, steps=3)
    stopped.number = number
    with pytest.raises(Stopped) as caught, raised():
        fit(stopped, Pictures(), tmp_path, **QUICK)
    assert caught.value.number == number


class AllPoisoned(FlowMapTraining):
    def training_step(self, batch, batch_index):
        return super().training_step(batch, batch_index) * math.nan


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_no_training(tmp_path, steps):
    with pytest.raises(NothingTrainedError, match=f"optimizer.steps={steps}"):
        fit(module(steps=steps), Pictures(), tmp_path, **QUICK)


def test_what_was_skipped_or_blew_up_is_not_trained(tmp_path, whole):
    check_trained(whole.module)
    skipped = module(AllPoisoned)
    fit(skipped, Pictures(), tmp_path, **QUICK)
    with pytest.raises(NothingTrainedError, match="all of 12 steps were skipped"):
        check_trained(skipped)
    broken = module()
    broken.average.n_averaged += 1
    next(broken.ema.parameters()).data[0] = math.inf
    with pytest.raises(NothingTrainedError, match="not finite"):
        check_trained(broken)


def test_a_line_that_a_kill_cut_is_no_history_and_is_gone_at_the_next_start(tmp_path):
    log = Metrics(tmp_path)
    for step in range(3):
        log.log_metrics({"loss": 9.0 - step}, step)
    lines = log.file.read_bytes()
    log.file.write_bytes(lines[:-4])
    assert history(tmp_path)["loss"] == ([0, 1], [9.0, 8.0])
    Metrics(tmp_path).log_metrics({"loss": 7.0}, 2)
    assert log.file.read_bytes() == lines


def test_what_is_logged_is_never_written_again(tmp_path):
    """A name that comes later is no reason to: a kill would lose what was there."""
    log, content = Metrics(tmp_path), b""
    for step, name in enumerate(("loss", "val", "loss", "rate")):
        log.log_metrics({name: 1.0}, step)
        assert log.file.read_bytes().startswith(content) and log.file.read_bytes().count(b"\n") == step + 1
        content = log.file.read_bytes()
