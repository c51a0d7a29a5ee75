"""FlowMap: its relations, its wrappers, its ledger, its files."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping

import pytest
import torch
from kinds import a

import steerfm
from steerfm import GaussianMixture
from steerfm.checkpoints import build_network
from steerfm.cost import Ledger
from steerfm.flowmap import FlowMap, Guided, Microbatched, NeuralFlowMap, Wrapped
from steerfm.interpolant import Interpolant, Trigonometric
from steerfm.networks import Mlp, UNet
from steerfm.rows import map_condition

ARCHITECTURE = {"name": "mlp", "dim": 3, "width": 16, "depth": 2, "classes": 2}
NAMES = ("Ankle boot", "Bag")


def rows(n: int = 5, dim: int = 3) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Tagged(FlowMap):
    """u = the value that the condition holds under ``shift``, to see which condition arrives where."""

    def __init__(self) -> None:
        super().__init__((3,))
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def average_velocity(self, x, s, t, cond):
        return torch.zeros_like(x) + a(Mapping, cond)["shift"].view(-1, 1)


# --- jumps -----------------------------------------------------------------------------------------------------------
def test_identity_on_the_diagonal(random_map):
    fm, x = random_map(), rows()
    assert torch.equal(fm.jump(x, 0.3, 0.3), x)
    t = torch.rand(5, dtype=torch.float64)
    assert torch.equal(fm.jump(x, t, t), x)
    with Ledger() as ledger:
        fm.jump(x, 1.0, 1)
    assert ledger.cost.forwards == 0


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
def test_floats_and_rows_of_times_agree(random_map, path):
    fm, x = random_map(interpolant=path), rows()
    s, t = torch.full((5,), 0.2, dtype=torch.float64), torch.full((5,), 0.7, dtype=torch.float64)
    whole = fm.jump(x, 0.2, 0.7)
    torch.testing.assert_close(fm.jump(x, s, 0.7), whole)
    torch.testing.assert_close(fm.jump(x, s, t), whole)
    torch.testing.assert_close(fm.velocity(x, t), fm.velocity(x, 0.7))
    torch.testing.assert_close(fm.lookahead(x, s, hops=2), fm.lookahead(x, 0.2, hops=2))
    torch.testing.assert_close(fm.score(x, t), fm.score(x, 0.7))
    torch.testing.assert_close(fm.denoise(x, t), fm.denoise(x, 0.7))


def test_rows_of_times_stay_with_their_rows(random_map):
    fm, x = random_map(), rows()
    s, t = torch.rand(2, 5, dtype=torch.float64).sort(0).values
    together = fm.jump(x, s, t)
    for i in range(5):
        torch.testing.assert_close(fm.jump(x[i : i + 1], s[i].item(), t[i].item())[0], together[i])


def test_jump_is_its_definition(random_map):
    fm, x = random_map(), rows()
    u = fm.average_velocity(x, torch.full((5,), 0.2).double(), torch.full((5,), 0.7).double(), None)
    torch.testing.assert_close(fm.jump(x, 0.2, 0.7), x + 0.5 * u)
    h = 1e-6
    torch.testing.assert_close((fm.jump(x, 0.4, 0.4 + h) - x) / h, fm.velocity(x, 0.4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.7, 1.0])
def test_hops_of_a_lookahead_compose(random_map, t):
    fm, x = random_map(), rows()
    middle = (1 + t) / 2
    by_hand = fm.jump(fm.jump(x, t, middle), middle, 1.0)
    torch.testing.assert_close(fm.lookahead(x, t, hops=2), by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fm.lookahead(x, t), fm.jump(x, t, 1.0), rtol=1e-12, atol=1e-12)
    y = x
    for i in range(4):
        y = fm.jump(y, t + (1 - t) * i / 4, t + (1 - t) * (i + 1) / 4)
    torch.testing.assert_close(fm.lookahead(x, t, hops=4), y, rtol=1e-12, atol=1e-12)
    if t < 1:
        assert (fm.lookahead(x, t, hops=2) - fm.lookahead(x, t)).abs().max() > 1e-6  # not exact: they may differ


def test_a_lookahead_needs_a_hop(random_map):
    with pytest.raises(ValueError, match="hops=0"):
        random_map().lookahead(rows(), 0.5, hops=0)


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
@pytest.mark.parametrize("t", [0.2, 0.8])
def test_denoiser_score_and_velocity(random_map, path, t):
    fm, x = random_map(interpolant=path), rows()
    x1, score = fm.denoise(x, t), fm.score(x, t)
    tweedie = (x + path.sigma(t) ** 2 * score) / path.alpha(t)
    torch.testing.assert_close(x1, tweedie, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path.velocity_from_denoised(x, x1, t), fm.velocity(x, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
def test_an_untrained_map_is_exact_for_its_gaussian(path):
    fm = NeuralFlowMap(Mlp(3), (3,), path, mean=0.3, std=0.7).double()
    x = rows()
    torch.testing.assert_close(fm.jump(x, 0.0, 1.0), 0.3 + 0.7 * x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fm.lookahead(x, 0.2, hops=4), fm.lookahead(x, 0.2), rtol=1e-10, atol=1e-10)


def test_the_network_sees_unit_variance(random_map):
    seen = []
    fm = random_map(dim=2)
    fm.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 20_000, 2, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.4, 1.0):
        fm.velocity(fm.interpolant.interpolate(x0, fm.mean + fm.std * x1, t), t)
    for x in seen:
        assert x.mean().abs() < 4 / 40_000**0.5
        assert (x.var() - 1).abs() < 4 * (2 / 40_000) ** 0.5


def test_the_hook_must_be_written():
    with pytest.raises(NotImplementedError):
        FlowMap((3,)).jump(rows(), 0.0, 1.0)


# --- pictures and conditions -----------------------------------------------------------------------------------------
def test_decoding_pictures_and_vectors():
    pictures, vectors = FlowMap((1, 4, 4)), FlowMap((4,))
    z = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    assert pictures.decode(z).min() == 0
    assert pictures.decode(z).max() == 1
    torch.testing.assert_close(pictures.encode(pictures.decode(z)), z)
    assert pictures.decode(3 * z).aminmax() == (0, 1)
    assert torch.equal(vectors.decode(5 * z.view(8, 4)), 5 * z.view(8, 4))
    assert torch.equal(vectors.encode(z.view(8, 4)), z.view(8, 4))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("Bag", [1, 1]), ("ankle BOOT", [0, 0]), (1, [1, 1]), ("1", [1, 1]), (["Bag", 0], [1, 0]), (None, None)],
)
def test_conditions_by_name_and_index(random_map, labels, expected):
    cond = random_map(classes=2, class_names=NAMES).condition(labels, 2)
    assert cond is None if expected is None else cond.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("Bags", "0 Ankle boot, 1 Bag"),
        (2, "unknown class 2"),
        (-1, "unknown class -1"),
        (["Bag"] * 3, "3 labels for n=2"),
    ],
)
def test_unknown_conditions(random_map, labels, message):
    with pytest.raises(ValueError, match=message):
        random_map(classes=2, class_names=NAMES).condition(labels, 2)


def test_an_unconditional_map_says_so(random_map):
    with pytest.raises(ValueError, match="unconditional"):
        random_map().condition("Bag", 1)


def test_map_condition_goes_through_every_form():
    double = {"a": torch.ones(2), "b": torch.zeros(2, 3)}
    assert map_condition(torch.sin, None) is None
    assert a(torch.Tensor, map_condition(lambda c: c + 1, torch.ones(2))).tolist() == [2, 2]
    mapped = a(Mapping, map_condition(lambda c: c[:1], double))
    assert {name: tuple(c.shape) for name, c in mapped.items()} == {"a": (1,), "b": (1, 3)}


def test_dictionary_conditions_reach_the_hook():
    fm, x = Tagged(), rows(3)
    cond = {"shift": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    moved = fm.jump(x, 0.0, 1.0, cond) - x
    torch.testing.assert_close(moved, a(Mapping, cond)["shift"].view(-1, 1).expand(3, 3))
    torch.testing.assert_close(Microbatched(fm, 2).jump(x, 0.0, 1.0, cond) - x, moved)
    null = {"shift": torch.tensor([-1.0], dtype=torch.float64)}
    guided = Guided(fm, 2.0, null).jump(x, 0.0, 1.0, cond) - x
    torch.testing.assert_close(guided, (-1 + 2 * (cond["shift"] + 1)).view(-1, 1).expand(3, 3))


# --- wrappers --------------------------------------------------------------------------------------------------------
def test_guidance_interpolates_the_two_maps(random_map):
    fm, x = random_map(classes=2), rows()
    labels = torch.tensor([0, 1, 0, 1, 1])
    conditional, null = fm.jump(x, 0.2, 0.9, labels), fm.jump(x, 0.2, 0.9, torch.full((5,), 2))
    assert (conditional - null).abs().max() > 1e-3
    for scale in (0.0, 1.0, 2.5):
        expected = null + scale * (conditional - null)
        torch.testing.assert_close(Guided(fm, scale).jump(x, 0.2, 0.9, labels), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Guided(fm, 0.0).jump(x, 0.2, 0.9, labels), fm.jump(x, 0.2, 0.9, None))


def test_guidance_counts_two_forwards(random_map):
    fm, x, labels = random_map(classes=2), rows(), torch.zeros(5, dtype=torch.long)
    with Ledger() as ledger:
        Guided(fm, 2.0).jump(x, 0.0, 1.0, labels)
        Microbatched(Guided(fm, 2.0), 2).velocity(x, 0.5, labels)
        Guided(Microbatched(fm, 2), 2.0).velocity(x, 0.5, labels)
    assert ledger.cost.forwards == 3 * 2 * 5


def test_guidance_errors(random_map):
    fm = random_map(classes=2)
    with pytest.raises(ValueError, match="needs a condition"):
        Guided(fm, 2.0).velocity(rows(), 0.5)
    with pytest.raises(ValueError, match="finite"):
        Guided(fm, float("inf"))
    with pytest.raises(ValueError, match="null condition"):
        Guided(random_map(), 2.0)
    with pytest.raises(ValueError, match="both"):
        Guided(fm, 2.0).velocity(rows(), 0.5, {"label": torch.zeros(5)})


@pytest.mark.parametrize("size", [1, 2, 5, 99])
def test_microbatches_change_nothing(random_map, size):
    fm, x = random_map(classes=2), rows()
    s, t = torch.rand(2, 5, dtype=torch.float64).sort(0).values
    labels = torch.tensor([0, 1, 2, 1, 0])
    sizes = []
    fm.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    small = Microbatched(fm, size)
    split = small.jump(x, s, t, labels)
    assert max(sizes) == min(size, 5)
    assert sum(sizes) == 5
    torch.testing.assert_close(split, fm.jump(x, s, t, labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.velocity(x, 0.3), fm.velocity(x, 0.3), rtol=1e-12, atol=1e-12)
    with Ledger() as ledger:
        small.score(x, 0.3)
    assert ledger.cost.forwards == 5


def test_a_microbatch_needs_a_row(random_map):
    with pytest.raises(ValueError, match="micro_batch=0"):
        Microbatched(random_map(), 0)


def test_wrappers_keep_space_and_pictures():
    fm = NeuralFlowMap(UNet(1, widths=(8,)), (1, 4, 4), Trigonometric(), NAMES)
    wrapped = Wrapped(fm)
    assert (wrapped.shape, wrapped.interpolant, wrapped.class_names) == (fm.shape, fm.interpolant, fm.class_names)
    assert (wrapped.device, wrapped.dtype) == (fm.device, fm.dtype)
    z = torch.randn(2, 1, 4, 4)
    assert torch.equal(wrapped.decode(z), fm.decode(z))
    assert torch.equal(wrapped.encode(z), fm.encode(z))
    assert torch.equal(wrapped.jump(z, 0.0, 1.0), fm.jump(z, 0.0, 1.0))


# --- the ledger ------------------------------------------------------------------------------------------------------
def test_the_ledger_counts_samples(random_map):
    fm, x = random_map(), rows()
    with Ledger() as ledger:
        fm.jump(x, 0.0, 0.5)
        fm.lookahead(x, 0.5, hops=3)
        fm.velocity(x[:2], 0.5)
        fm.denoise(x[:1], 0.5)
        fm.score(x[:1], 0.5)
        fm.decode(x)
    assert (ledger.cost.forwards, ledger.cost.decodes, ledger.cost.backwards) == (5 + 15 + 2 + 1 + 1, 5, 0)


def test_the_ledger_counts_backwards_that_happen(random_map):
    fm, x = random_map(), rows().requires_grad_()
    with Ledger() as ledger:
        y = fm.lookahead(x, 0.0, hops=2)
        assert ledger.cost.backwards == 0
        torch.autograd.grad(y.sum(), x)
    assert (ledger.cost.forwards, ledger.cost.backwards) == (10, 10)


# --- files -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(randomise, tmp_path):
    """(map, path) of a map with random weights, stored in half precision."""
    network = randomise(build_network(ARCHITECTURE))
    fm = NeuralFlowMap(network, (3,), Trigonometric(), NAMES, mean=-0.4, std=0.6)
    return fm, fm.save(tmp_path / "folder" / "model", ARCHITECTURE, {"licence": "MIT"})


def test_saved_in_half_precision(saved):
    fm, path = saved
    loaded = NeuralFlowMap.load(path)
    assert path.suffix == ".safetensors"
    assert json.loads(path.with_suffix(".json").read_text())["card"] == {"licence": "MIT"}
    assert (loaded.shape, loaded.class_names, loaded.mean, loaded.std) == ((3,), NAMES, -0.4, 0.6)
    assert type(loaded.interpolant) is Trigonometric
    for p, q in zip(loaded.network.parameters(), fm.network.parameters()):
        assert p.dtype == torch.float32
        assert not p.requires_grad
        assert ((p - q).abs() <= 2**-11 * q.abs() + 2**-25).all()  # half an ulp, normal or subnormal
    assert not loaded.training
    assert not list(path.parent.glob("*.tmp"))


def test_saved_in_full_precision(saved, tmp_path):
    fm, _ = saved
    loaded = NeuralFlowMap.load(fm.save(tmp_path / "exact.safetensors", ARCHITECTURE, {}, half=False))
    x = rows().float()
    assert torch.equal(loaded.jump(x, 0.1, 0.9, torch.ones(5).long()), fm.jump(x, 0.1, 0.9, torch.ones(5).long()))


def test_dots_belong_to_the_name(saved, tmp_path):
    fm, _ = saved
    paths = {fm.save(tmp_path / f"share-0.{i}", ARCHITECTURE, {"i": i}) for i in (1, 2)}
    assert {path.name for path in paths} == {"share-0.1.safetensors", "share-0.2.safetensors"}
    assert NeuralFlowMap.load(tmp_path / "share-0.2").shape == (3,)


def damage_weights(path):
    path.write_bytes(b"\x00" * 100)


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage_everything(path):
    path.write_bytes(b"")


def damage_with_pickle(path):
    path.write_bytes(pickle.dumps({"weight": [1, 2, 3]}))


def damage_with_torch(path):
    torch.save({"weight": torch.ones(3)}, path)


def damage_json(path):
    path.with_suffix(".json").write_text("{not json")


def damage_json_type(path):
    path.with_suffix(".json").write_text("[1, 2]")


def damage_json_encoding(path):
    path.with_suffix(".json").write_bytes(b"\xff\xfe\x00")


def rewrite(**changes):
    def damage(path):
        head = json.loads(path.with_suffix(".json").read_text()) | changes
        head = {key: value for key, value in head.items() if value is not None}
        path.with_suffix(".json").write_text(json.dumps(head))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "corrupt checkpoint"),
        (damage_end, "corrupt checkpoint"),
        (damage_everything, "corrupt checkpoint"),
        (damage_with_pickle, "corrupt checkpoint"),
        (damage_with_torch, "corrupt checkpoint"),
        (damage_json, "corrupt checkpoint"),
        (damage_json_encoding, "corrupt checkpoint"),
        (damage_json_type, "describes 'list', expected 'flow_map'"),
        (rewrite(kind="classifier"), "describes 'classifier', expected 'flow_map'"),
        (rewrite(kind=None), "describes None"),
        (rewrite(std=None), "'std' in its .json"),
        (rewrite(network=None), "'network' in its .json"),
        (rewrite(interpolant="cubic"), "'cubic' in its .json"),
        (rewrite(network=ARCHITECTURE | {"width": 8}), "do not fit its architecture"),
        (rewrite(network=ARCHITECTURE | {"depth": 1}), "do not fit its architecture"),
        (rewrite(network=ARCHITECTURE | {"name": "transformer"}), "unknown network 'transformer'"),
        (rewrite(network=ARCHITECTURE | {"widht": 8}), "widht"),
        (rewrite(network={"dim": 3}), "unknown network None"),
    ],
)
def test_damaged_files_are_one_line_errors(saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        NeuralFlowMap.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_missing_files_are_named(saved, suffix):
    _, path = saved
    path.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=f"model{suffix}"):
        NeuralFlowMap.load(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks at it itself
def test_a_compiled_map_is_the_same_map(randomise):
    """In value and gradient, for any number of rows."""
    torch.manual_seed(0)
    plain = NeuralFlowMap(randomise(Mlp(2, width=16, depth=1)).eval().requires_grad_(False), (2,), std=0.7)
    compiled = plain.compiled()
    for rows in (3, 8):
        x = torch.randn(rows, 2)
        found = []
        for flow_map in (plain, compiled):
            y = x.clone().requires_grad_()
            moved = flow_map.jump(y, 0.1, 0.8)
            found.append((moved, *torch.autograd.grad(moved.square().sum(), y)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# --- precision -------------------------------------------------------------------------------------------------------
def narrowed(flow_map):
    """The same map, its network in bfloat16."""
    return flow_map.with_network(copy.deepcopy(flow_map.network).bfloat16())


def test_states_are_float32_beside_a_bfloat16_network():
    """The network alone rounds: eight steps off by what eight of its roundings are, not by those of the states."""
    flow_map = steerfm.load("fashion")
    half = narrowed(flow_map)
    assert half.dtype == torch.bfloat16 and half.state_dtype == torch.float32
    cond = torch.tensor([0, 8, 3])
    whole, coarse = (steerfm.sample(each, n=3, steps=8, cond=cond) for each in (flow_map, half))
    assert coarse.dtype == torch.float32
    assert (whole - coarse).square().mean().sqrt() < 0.03 * whole.std()
    result = steerfm.steer(half, "brightness", steerfm.FeynmanKac(4, 4), n=2, label="Bag")
    assert result.samples.dtype == torch.float32 and result.rewards.isfinite().all()
    guided = steerfm.steer(steerfm.Guided(half, 2.0), "brightness", "fmrg_j", n=1, label="Bag")
    assert guided.samples.dtype == torch.float32


def test_an_own_map_gets_states_in_the_precision_of_its_parameters():
    class Own(FlowMap):
        def __init__(self):
            super().__init__((3,))
            self.layer = torch.nn.Linear(5, 3).bfloat16()

        def average_velocity(self, x, s, t, cond):
            return self.layer(torch.cat([x, s[:, None], t[:, None]], 1))

    assert steerfm.sample(Own(), n=4, steps=3).dtype == torch.float32


def test_a_wrapper_that_makes_its_times_anew_has_the_same_velocity():
    """No object's identity says which of the two is wanted."""

    class Anew(FlowMap):
        def __init__(self, inner):
            super().__init__(inner.shape, inner.interpolant)
            self.inner = inner

        def average_velocity(self, x, s, t, cond):
            return self.inner.average_velocity(x.clone(), s.clone(), t.clone(), cond)

    mixture = GaussianMixture([[-2.0, 0.0], [1.0, 1.0]], [[0.3, 0.2], [0.1, 0.5]])
    inner, x = mixture.flow_map(), torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    inner = inner.double()
    for t in (0.0, 0.4, 0.9):
        exact = inner.velocity(x, t)
        for wrapped in (Anew(inner), Microbatched(inner, 4), Microbatched(Anew(inner), 4)):
            torch.testing.assert_close(wrapped.velocity(x, t), exact, rtol=1e-9, atol=1e-9)
