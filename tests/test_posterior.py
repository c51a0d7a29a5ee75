"""Maps that draw posteriors: the plain map stays what it was, the ends are exact, and the loss vanishes at the truth."""

import math
from functools import partial

import pytest
import torch

import steerfm
from steerfm import GaussianMixture, Interpolant, NeuralFlowMap, Trigonometric, glass
from steerfm.capabilities import can
from steerfm.cost import Ledger
from steerfm.finetuning import METHODS, FineTuning
from steerfm.finetuning.lora import LoRA
from steerfm.flowmap import Microbatched
from steerfm.networks import Mlp, UNet, fit_posterior, of_posteriors
from steerfm.rewards import as_reward
from steerfm.sampling import Noise
from steerfm.steering import Posterior
from steerfm.training import FlowMapTraining
from steerfm.training.objectives import Posterior as Objective
from steerfm.training.objectives import PosteriorTrajectory as Trajectories
from steerfm.training.objectives import Trajectory, Triangle
from steerfm.zoo import with_adapters


def mlp(posterior=True, spread=0.3, classes=0, path=None, mean=0.5, std=1.3, rank=0, start=False):
    """A map of a network that is not at its start, or of which only what posteriors use is."""
    torch.manual_seed(0)
    network = Mlp(3, 32, 2, classes, posterior=posterior, posterior_rank=rank)
    for name, parameter in network.named_parameters():
        if start and of_posteriors(name):
            continue
        parameter.data += spread * torch.randn_like(parameter) / math.sqrt(parameter.shape[-1])
    return NeuralFlowMap(network, (3,), path, [f"class {i}" for i in range(classes)], mean=mean, std=std).eval()


def states(n=6, shape=(3,)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, *shape, generator=generator) for _ in range(2)]


# --- the plain map ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    "network",
    [lambda p, r: Mlp(12, posterior=p, posterior_rank=r), lambda p, r: UNet(1, (8, 16), posterior=p, posterior_rank=r)],
)
def test_a_plain_map_goes_on_as_it_was(network, rank):
    shape = (12,) if isinstance(network(False, 0), Mlp) else (1, 12, 12)
    plain, joint = network(False, 0), network(True, rank)
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    joint.load_state_dict(fit_posterior(joint, plain.state_dict()))
    (x, z), maps = states(4, shape), [NeuralFlowMap(net, shape, mean=0.2, std=0.8) for net in (plain, joint)]
    assert torch.equal(maps[0].jump(x, 0.2, 0.7), maps[1].jump(x, 0.2, 0.7))
    torch.testing.assert_close(maps[1].posterior(x, 0.0, z), maps[0].lookahead(z, 0.0))
    assert "posterior" in maps[1].capabilities and "posterior" not in maps[0].capabilities
    plain.load_state_dict(fit_posterior(plain, joint.state_dict()))  # and back


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_ends_are_exact_whatever_the_weights(path, rank):
    flow_map, (x, z) = mlp(path=path, rank=rank), states()
    torch.testing.assert_close(flow_map.posterior(x, 0.0, z), flow_map.lookahead(z, 0.0))
    torch.testing.assert_close(flow_map.posterior(x, 0.0, z), flow_map.posterior(-x, 0.0, z))
    torch.testing.assert_close(flow_map.posterior(x, 1.0, z), x)
    near = flow_map.posterior(x, torch.full((6,), 0.9999), z)
    torch.testing.assert_close(near, x, atol=2e-3, rtol=0)


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
@pytest.mark.parametrize("hops", [1, 3])
def test_at_the_start_it_is_that_of_the_gaussian(path, hops):
    torch.manual_seed(0)
    flow_map = NeuralFlowMap(Mlp(3, posterior=True), (3,), path, mean=0.5, std=1.3)
    gaussian = GaussianMixture(torch.full((1, 3), 0.5), torch.full((1, 3), 1.69), interpolant=path)
    x, z = states()
    for t in (0.0, 0.3, 0.8):
        exact = gaussian.posterior(x, t)
        torch.testing.assert_close(flow_map.posterior(x, t, z, hops=hops), exact.means[:, 0] + exact.factors[:, 0] * z)


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
def test_with_a_rank_it_starts_as_the_map_at_the_joint_state(path):
    """The velocity of the inner flow exactly, and one jump where nothing is known of z; many hops converge to GLASS."""
    flow_map, (x, z) = mlp(path=path, rank=3, start=True), states()
    s, t = torch.tensor([[0.0, 0.2, 0.5, 0.9, 0.6, 0.99], [0.4, 0.0, 0.1, 0.7, 0.95, 0.3]])
    inner = glass.inner_velocity(flow_map, z, s, x, t, None)
    torch.testing.assert_close(flow_map.posterior_velocity(z, s, s, x, t, None), inner)
    jump = torch.where(t[:, None] > 0, flow_map.lookahead(x, t), flow_map.lookahead(z, 0.0))
    torch.testing.assert_close(flow_map.posterior(x, t, z), jump)
    if type(path) is Interpolant:  # the inner path of `glass.draw`
        fine = glass.draw(flow_map, x, 0.4, z.unsqueeze(1), None, 200)[:, 0]
        torch.testing.assert_close(flow_map.posterior(x, 0.4, z, hops=500), fine, atol=0.02, rtol=0)


# --- the objective ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
@pytest.mark.parametrize("diagonal", [0.0, 0.5, 1.0])
def test_the_loss_is_zero_at_the_truth_and_not_elsewhere(path, diagonal):
    gaussian = GaussianMixture(torch.full((1, 3), 0.5), torch.full((1, 3), 1.69), interpolant=path)
    x1 = gaussian.sample(200, torch.Generator().manual_seed(0)).float()
    objective = Objective(Triangle(), diagonal, gaussian.flow_map())
    right = NeuralFlowMap(Mlp(3, posterior=True), (3,), path, mean=0.5, std=1.3)
    losses = [objective(flow_map, x1, None, torch.Generator().manual_seed(2)) for flow_map in (right, mlp(path=path))]
    assert losses[0].shape == (200,) and losses[0].max() < 1e-5
    assert losses[1].mean() > 1e-2


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
@pytest.mark.parametrize("diagonal", [0.0, 1.0])
def test_inner_trajectories_are_those_of_the_truth_up_to_the_second_order_of_their_steps(path, diagonal):
    gaussian = GaussianMixture(torch.full((1, 3), 0.5), torch.full((1, 3), 1.69), interpolant=path)
    x1 = gaussian.sample(400, torch.Generator().manual_seed(0)).float()
    right = NeuralFlowMap(Mlp(3, posterior=True), (3,), path, mean=0.5, std=1.3)

    def loss(flow_map, steps, keep=0):
        objective = Trajectories(Triangle(0.2, 0.2), steps=steps, diagonal=diagonal, teacher=gaussian.flow_map(), keep=keep)
        return objective(flow_map, x1, None, torch.Generator().manual_seed(2)).mean()

    assert loss(right, 8) < 1e-3 and loss(right, 64) < loss(right, 8) / 30
    assert loss(right, 64, keep=400) < 4e-5 and loss(mlp(path=path), 32) > 1e-2


@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()])
@pytest.mark.parametrize("t", [0.0, 0.6, 0.9, 0.98])
def test_few_steps_draw_as_widely_as_the_posterior_is_near_the_data_too(path, t):
    """With steps that are equal in the joint time; with steps equal in the inner time draws are a tenth as wide at .98."""
    mixture = GaussianMixture([[-1.5, 0.0], [1.0, 1.2]], [[0.15, 0.3], [0.2, 0.1]], [0.6, 0.4], interpolant=path)
    generator = torch.Generator().manual_seed(0)
    x1, e = mixture.sample(1, generator), torch.randn(1, 2, generator=generator, dtype=torch.float64)
    x, flow_map, n = path.interpolate(e, x1, t), mixture.flow_map(), 20_000
    exact, z = mixture.posterior(x, t), torch.randn(1, n, 2, generator=generator, dtype=torch.float64)
    for times in (t, torch.tensor([t], dtype=torch.float64)):
        draws = glass.draw(flow_map, x, times, z, None, 12, joint=True)[0]
        variance = exact.cov()[0].diag()
        assert ((draws.mean(0) - exact.mean()[0]) / (variance / n).sqrt()).abs().max() < 4
        assert (draws.var(0) / variance / z[0].var(0) - 1).abs().max() < 0.12
    if t > 0.7:
        assert (glass.draw(flow_map, x, t, z, None, 12)[0].var(0) / variance).max() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Objective, partial(Trajectories, uses=16, keep=4096)])
def test_training_learns_two_modes(kind):
    """One call draws each mode as often as the exact posterior does, at states where that is neither 0 nor 1."""
    mixture = GaussianMixture([[-1.5], [1.5]], [[0.04], [0.04]], [0.3, 0.7])
    torch.manual_seed(0)
    network = Mlp(1, 48, 3, posterior=True)
    flow_map = NeuralFlowMap(network, (1,), mean=mixture.mean().item(), std=mixture.cov().sqrt().item())
    objective = kind(Triangle(0.3, 0.3), teacher=mixture.to(torch.float32).flow_map())
    optimizer, generator = torch.optim.Adam(network.parameters(), 3e-3), torch.Generator().manual_seed(1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        optimizer.zero_grad()
        objective(flow_map, mixture.sample(256, generator).float(), None, generator).mean().backward()
        optimizer.step()
    x, t = torch.linspace(-1.2, 0.6, 5).unsqueeze(1), 0.3
    exact = mixture.posterior(x, t).weights[:, 1]
    assert exact.min() < 0.3 and exact.max() > 0.8
    z = torch.randn(5, 2000, 1, generator=generator)
    with torch.no_grad():
        draws = flow_map.posterior(x.repeat_interleave(2000, 0), t, z.flatten(0, 1)).view(5, 2000)
    assert ((draws > 0).float().mean(1) - exact).abs().max() < 0.1
    assert (draws.abs() - 1.5).abs().median() < 0.3


@pytest.mark.parametrize(("start", "objective"), [(0.0, Trajectories), (0.5, Trajectories), (0.0, Trajectory)])
def test_all_that_is_trained_has_a_gradient_where_there_are_no_draws_too(start, objective):
    """Processes wait for the gradient of each parameter."""
    flow_map = mlp()
    module = FlowMapTraining(flow_map, {objective(uses=2): 0.5}, start=start, steps=10)
    module.log = lambda *args, **options: None
    module.training_step([torch.randn(8, 3)], 0).backward()
    assert all(parameter.grad is not None for parameter in flow_map.body.parameters())


@pytest.mark.parametrize(("share", "rank"), [(1.0, 3), (0.5, 3), (1.0, 0)])
def test_what_is_trained(share, rank):
    """With a rank and nothing but draws, only what draws use; what its author froze, never."""
    flow_map = mlp(rank=rank)
    network = flow_map.body
    network.inputs.requires_grad_(False)
    network.state.requires_grad_(False)
    FlowMapTraining(flow_map, {Trajectories(): share}, start=0.0, steps=10)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(of_posteriors(name) for name in trained) is (share == 1 and rank > 0)
    assert not any(name.startswith(("inputs.", "state.")) for name in trained) and "state_time.layers.0.weight" in trained


def test_rows_of_small_batches():
    objective = Objective(diagonal=0.75)
    for n in (1, 2, 3):
        assert objective(mlp(), torch.randn(n, 3), None, torch.Generator().manual_seed(0)).shape == (n,)


# --- around it -------------------------------------------------------------------------------------------------------
def test_wrappers_pass_it_on():
    flow_map, (x, z) = mlp(classes=2), states()
    cond = torch.tensor([0, 1, 0, 1, 0, 1])
    whole = flow_map.posterior(x, 0.4, z, cond, hops=2)
    torch.testing.assert_close(Microbatched(flow_map, 4).posterior(x, 0.4, z, cond, hops=2), whole)
    with Ledger() as ledger:
        guided = steerfm.Guided(flow_map, 2.0).posterior(x, 0.4, z, cond)
    null = flow_map.posterior(x, 0.4, z, torch.full((6,), 2))
    torch.testing.assert_close(guided, torch.lerp(null, flow_map.posterior(x, 0.4, z, cond), 2.0))
    assert ledger.cost.forwards == 12


def test_a_file_of_it(tmp_path):
    flow_map, (x, z) = mlp(), states()
    flow_map.save(tmp_path / "joint", {"name": "mlp", "dim": 3, "width": 32, "depth": 2, "posterior": True}, half=False)
    again = steerfm.load(tmp_path / "joint.safetensors")
    torch.testing.assert_close(again.posterior(x, 0.3, z), flow_map.posterior(x, 0.3, z))
    assert "draws of the posterior" in repr(again)


@pytest.mark.parametrize("lora", [None, LoRA(2)])
def test_tuning_leaves_draws_to_the_base(lora, tmp_path):
    """It moves the velocity and the jumps: what the network would draw belongs to neither model any more."""
    if lora is not None:
        pytest.importorskip("peft")
    flow_map, (x, z) = mlp().eval().requires_grad_(False), states()
    tuning = FineTuning(flow_map, as_reward(lambda x: x.sum(1)), METHODS["posterior"](), batch_size=4, steps=2, lora=lora)
    assert can(flow_map, "posterior") and can(tuning.reference, "posterior")
    torch.testing.assert_close(tuning.reference.posterior(x, 0.3, z), flow_map.posterior(x, 0.3, z))
    assert not can(tuning.maps[0], "posterior") and not can(tuning.averaged(), "posterior")
    if lora is not None:  # adapters are in no file of a whole network
        return
    tuning.averaged().save(
        tmp_path / "tuned", {"name": "mlp", "dim": 3, "width": 32, "depth": 2, "posterior": True}, origin="base"
    )
    again = steerfm.load(tmp_path / "tuned.safetensors")
    assert not can(again, "posterior") and can(again, "two_time")


def test_adapters_leave_draws_to_the_base(tmp_path):
    base = mlp()
    layer = next(name for name, value in base.body.state_dict().items() if name.endswith(".weight") and value.ndim == 2)
    rows, columns = base.body.state_dict()[layer].shape
    name = layer.removesuffix(".weight")
    tuned = with_adapters(base, {f"{name}.up": torch.zeros(rows, 1), f"{name}.down": torch.zeros(1, columns)}, tmp_path)
    assert can(base, "posterior") and not can(tuned, "posterior")


def test_a_look_ahead_takes_the_map_s_own_draws():
    flow_map, (x, _) = mlp(), states()
    costs = {}
    for name, look in {"one": Posterior(k=4), "two": Posterior(k=4, hops=2), "glass": Posterior(2, k=4, hops=0)}.items():
        with Ledger() as ledger:
            z = look.endpoints(flow_map, x, 0.4, None, Noise(range(6))).z
        costs[name] = ledger.cost.forwards
        assert z.shape == (6, 4, 3) and z.std(1).min() > 0
    assert costs == {"one": 24, "two": 48, "glass": 96}
    with Ledger() as ledger:
        Posterior(2, k=4).endpoints(mlp(posterior=False), x, 0.4, None, Noise(range(6)))
    assert ledger.cost.forwards == 96


def test_what_has_none_says_so():
    x, z = states()
    with pytest.raises(ValueError, match="draws no posteriors"):
        mlp(posterior=False).posterior(x, 0.3, z)
    with pytest.raises(ValueError, match="hops=0"):
        mlp().posterior(x, 0.3, z, hops=0)
    with pytest.raises(ValueError, match="hops=-1"):
        Posterior(hops=-1)


def test_gradients_reach_the_state():
    flow_map, (x, z) = mlp(), states()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(flow_map.posterior(x, 0.5, z).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().min() > 0
