"""Streams: no two keys share one, none depends on what was drawn before, and nothing held out is trained on."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import steerfm
from steerfm.finetuning import AWM, NFT, Adjoint, Direct, FineTuning, Forward, HyperNoise, Policy, Tasks, Weighted
from steerfm.finetuning.evaluation import Monitor, Panel
from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import Mlp
from steerfm.randomness import derive, global_stream, is_derived, stream
from steerfm.rewards import as_reward
from steerfm.sampling import Noise
from steerfm.training import ClassifierTraining, FlowMapTraining
from steerfm.training.data import MixtureData, epoch_rows

BIG = [2**32, 2**39, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def draws(generator: torch.Generator, n: int = 4) -> tuple[float, ...]:
    return tuple(torch.randn(n, generator=generator, dtype=torch.float64).tolist())


def trainer(steps: int, callbacks=()) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


# --- keys ------------------------------------------------------------------------------------------------------------
def test_ten_thousand_keys_draw_pairwise_different_numbers():
    seeds = [0, 1, 2, 12345, 2**32 - 1, *BIG, 2**32 + 1, 2**40 + 1, -1]
    keys = {(seed, purpose, step, row) for seed in seeds for purpose in ("path", "training", "pool", "order")
            for step in (0, 1, 7, 2**32, 2**40) for row in range(40)}  # fmt: skip
    assert len(keys) > 10_000
    assert len({draws(stream(*key)) for key in keys}) == len(keys)
    assert len({derive(*key) for key in keys}) == len(keys)


def test_each_part_of_a_key_counts_by_itself():
    """Steps do not run into rows, nor purposes into numbers."""
    assert draws(stream(1, "a", 2, 3)) != draws(stream(1, "a", 3, 2))
    assert draws(stream(1, "a", 12, 3)) != draws(stream(1, "a", 1, 23))
    assert draws(stream(11, "a")) != draws(stream(1, "1a"))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_the_path_of_a_seed_of_32_bits_is_torchs_own_stream(seed):
    assert draws(stream(seed)) == draws(torch.Generator().manual_seed(seed))


def test_the_whole_state_comes_from_the_key():
    """The words that torch draws are those of numpy's Mersenne twister in the same state: nothing is left of a default."""
    generator = stream(3, "training", 1, 2)
    words = generator.get_state()[24 : 24 + 8 * 624].numpy().view("<u8").astype(np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    drawn = torch.randint(0, 2**24, (2000,), generator=generator).numpy()
    assert (drawn == twister.random_raw(2000) % 2**24).all()
    assert len(set(words.tolist())) > 620


def test_streams_look_independent(z_score):
    """Means, variances and correlations of 2,000 neighbouring streams, as z-scores."""
    x = torch.stack([torch.randn(64, generator=stream(row % 5, "training", row // 5, row)) for row in range(2000)]).double()
    assert z_score(x).abs().max() < 4.5
    assert z_score(x.square(), 1.0).abs().max() < 4.5
    assert z_score(x[1:] * x[:-1]).abs().max() < 4.5


def test_a_stream_depends_on_no_global_state():
    expected = draws(stream(5, "training", 3)), Noise([5], 2).normal((3,), torch.empty(0))
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    torch.set_default_dtype(torch.float64)
    try:
        again = draws(stream(5, "training", 3)), Noise([5], 2).normal((3,), torch.empty(0, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected[0] == again[0] and torch.equal(expected[1], again[1])


def test_torchs_own_generators_are_lent_and_given_back():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    inside = []
    for key in [(0, "weights"), (2**32, "weights"), (0, "dropout"), (0, "weights")]:
        with global_stream(*key):
            inside.append(tuple(torch.rand(3).tolist()))
    assert inside[0] == inside[3] and len(set(inside)) == 3
    assert torch.equal(torch.rand(3), expected)


# --- steering --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", BIG)
def test_outputs_of_large_seeds_differ(offset):
    gm = steerfm.GaussianMixture([[-1.0], [1.0]], [[0.1], [0.1]]).flow_map()
    samples = steerfm.sample(gm, n=4, seeds=[0, offset, 1, offset + 1])
    assert len(samples.unique()) == 4
    method = steerfm.FeynmanKac(particles=4, steps=3)
    result = steerfm.steer(gm, lambda x: x[:, 0], method, n=2, seeds=[0, offset], strength=3.0)
    assert not torch.equal(result.samples[0], result.samples[1])


def test_selection_and_look_aheads_have_streams_of_their_own():
    noise = Noise(range(3), 2)
    path = noise.normal((8,), torch.empty(0))
    other = noise.other().normal((8,), torch.empty(0))
    assert not torch.isin(path, other).any()
    assert len({tuple(row) for row in noise.uniform(8, torch.device("cpu")).tolist()}) == 3
    assert not torch.equal(noise.other("a").normal((8,), torch.empty(0)), noise.other("b").normal((8,), torch.empty(0)))


# --- tuning ----------------------------------------------------------------------------------------------------------
def small_map() -> NeuralFlowMap:
    with global_stream(0, "weights"):
        network = Mlp(2, width=16, depth=2)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.4)
    return NeuralFlowMap(network, (2,))


def reward(x):
    return x[:, 0] - 0.3 * x[:, 1].square()


METHODS = {
    "direct": Direct(),
    "noise": HyperNoise(),
    "adjoint": Adjoint(steps=4, trained=2),
    "weighted": Weighted(rounds=2, samples=64),
    "policy": Policy(group=4),
    "forward": Forward(group=4),
    "nft": NFT(group=4),
    "awm": AWM(group=4),
}


def tune(method, seed: int, steps: int = 4, watch=()) -> tuple[torch.Tensor, list[tuple[list[int], torch.Tensor]], FineTuning]:
    """Weights after a few updates, and the seeds and noise of each."""
    seen = []

    class Watched(FineTuning):
        def update(self, rows):
            update = super().update(rows)
            seen.append((list(update.noise.seeds), Noise(update.noise.seeds).start(update.tuned)))
            return update

    module = Watched(
        small_map(), as_reward(reward), method, batch_size=8, control=1.0, scale=1.0, steps=steps, seed=seed, lr=1e-2
    )
    trainer(steps, watch).fit(module, module.data())
    return torch.cat([p.detach().flatten() for p in module.network.parameters()]), seen, module


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_seeds_train_on_noise_of_their_own(name):
    seeds = [0, 1, 12345, 2**32, 2**40]
    runs = [tune(METHODS[name], seed) for seed in seeds]
    rows = [tuple(row) for _, seen, _ in runs for seeds, x in seen[:: getattr(METHODS[name], "reuse", 1)] for row in x.tolist()]
    assert len(set(rows)) == len(rows)  # over updates, rows and seeds
    weights = torch.stack([w for w, _, _ in runs])
    assert (torch.pdist(weights) > 0).all()
    assert torch.equal(tune(METHODS[name], 1)[0], runs[1][0])


@pytest.mark.slow
def test_weights_of_seeds_differ_as_much_as_those_of_unrelated_noises(monkeypatch):
    """Distances over 20 updates, against the same training with noise from elsewhere."""

    def distances(runs):
        return torch.pdist(torch.stack(runs)).mean()

    ours = distances([tune(Direct(), seed, 20)[0] for seed in (0, 1, 12345)])
    unrelated = []
    for part in range(3):
        entropy = iter(np.random.SeedSequence([77, part]).generate_state(4096, np.uint32).tolist())
        monkeypatch.setattr("steerfm.finetuning.module.derive", lambda *key, entropy=entropy: next(entropy))
        unrelated.append(tune(Direct(), 0, 20)[0])
    assert 0.4 < ours / distances(unrelated) < 2.5


def test_no_seed_that_a_person_gives_is_trained_on():
    for name, method in METHODS.items():
        _, seen, _ = tune(method, 3)
        assert all(is_derived(seed) for seeds, _ in seen for seed in seeds), name
    assert not any(is_derived(seed) for seed in [0, 1, *BIG])


@pytest.mark.parametrize("name", ["weighted", "forward", "nft"])
def test_samples_and_their_fit_have_noises_of_their_own(name, monkeypatch):
    """No noise is drawn twice within an update, nor in the updates that use the same samples again."""
    starts: list[tuple[float, ...]] = []
    normal = Noise.normal

    def spy(self, shape, like):
        out = normal(self, shape, like)
        starts.extend(map(tuple, out.flatten(1).tolist()))
        return out

    monkeypatch.setattr(Noise, "normal", spy)
    method = METHODS[name]
    seen, update = [], FineTuning.update
    monkeypatch.setattr(FineTuning, "update", lambda self, rows: seen.append(update(self, rows)) or seen[-1])
    module = FineTuning(small_map(), as_reward(reward), method, batch_size=8, scale=1.0, steps=4, seed=0)
    trainer(4).fit(module, module.data())
    assert len(set(starts)) == len(starts) > 0


def test_a_panel_on_seeds_that_are_trained_on_is_refused_at_the_start():
    base = small_map()
    tasks = Tasks()[torch.zeros(8).long()]
    panel = Panel(base, as_reward(reward), None, tasks, tasks, lambda x: x, seeds=derive(0, "training"))
    watch = Monitor(panel, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training uses seeds of 128 bits"):
        tune(Direct(), 0, 1, [watch])


# --- training --------------------------------------------------------------------------------------------------------
def test_an_epoch_holds_each_row_once_and_batches_come_from_their_number():
    epochs = [
        torch.cat([epoch_rows(100, 10, seed, 10 * epoch + i) for i in range(10)])
        for seed in (0, 1, 2**32)
        for epoch in range(3)
    ]
    assert all(torch.equal(epoch.sort().values, torch.arange(100)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 9


def train(seed: int, steps: int, resume=None, folder=None):
    gm = steerfm.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], [[0.1, 0.1], [0.1, 0.1]])
    module = FlowMapTraining(small_map(), {}, steps=6, seed=seed, lr=1e-2, warmup=1)
    run = trainer(steps)
    run.fit(module, MixtureData(gm, 16, seed), ckpt_path=resume, weights_only=True)
    if folder:
        run.save_checkpoint(folder / "half.ckpt")
    return torch.cat([p.detach().flatten() for p in module.network.parameters()])


def test_training_seeds_differ_and_a_continued_training_draws_the_same(tmp_path):
    whole = [train(seed, 6) for seed in (0, 1, 2**32)]
    assert (torch.pdist(torch.stack(whole)) > 1e-3).all()
    train(0, 3, folder=tmp_path)
    torch.manual_seed(99)
    assert torch.equal(train(0, 6, resume=tmp_path / "half.ckpt"), whole[0])


def test_dropout_belongs_to_the_seed_and_the_update():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.head, self.seen = torch.nn.Dropout(0.5), torch.nn.Linear(64, 2), []
            torch.nn.init.zeros_(self.head.weight)

        def forward(self, x):
            x = self.drop(x.flatten(1))
            self.seen.append(tuple((x[0] == 0).tolist()))
            return self.head(x)

    def masks(seed):
        network = Net()
        data: Any = [(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]))] * 3
        module = ClassifierTraining(network, steps=3, seed=seed)
        trainer(3).fit(module, DataLoader(data, batch_size=None))
        return network.seen

    torch.manual_seed(1)
    first = masks(0)
    torch.manual_seed(2)
    assert masks(0) == first != masks(1) and len(set(first)) == 3


@pytest.mark.parametrize("use", [
    lambda: steerfm.load("fashion"), lambda: steerfm.load("emoji").condition("a red heart", 1),
    lambda: steerfm.reward("classifier", target="Bag"), lambda: steerfm.reward("judge", target="Bag"),
    lambda: steerfm.reward("clip", prompt="a red heart"),
], ids=["map", "map of words", "classifier", "judge", "clip"])  # fmt: skip
def test_loading_leaves_the_global_random_state_alone(use):
    state = torch.manual_seed(3).get_state()
    use()
    assert torch.equal(torch.get_rng_state(), state)
