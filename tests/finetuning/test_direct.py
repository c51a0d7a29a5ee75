"""Direct backpropagation: its knobs against what they are defined to be, and gradients against closed forms."""

from __future__ import annotations

import pytest
import torch

from steerfm.cost import Ledger
from steerfm.finetuning import AlignProp, Direct, DRaFT, DRaFTK, DRaFTLV, DRTune, ReFL, Tasks, Update
from steerfm.flowmap import NeuralFlowMap
from steerfm.rewards import as_reward
from steerfm.sampling import Noise


def linear(x):
    return x[:, 0] - 0.5 * x[:, 1]


def update(flow_map, control=0.0, step=0, b=8, reward=linear) -> Update:
    reference = flow_map.with_network(flow_map.network)
    tuned = copy_of(flow_map)
    tuned.requires_grad_(True)
    return Update(
        step, 10, tuned, tuned, reference.requires_grad_(False), as_reward(reward), Tasks()[torch.zeros(b).long()],
        Tasks(), Noise(range(b)), torch.Generator().manual_seed(step), control, 1.0,
    )  # fmt: skip


def copy_of(flow_map: NeuralFlowMap) -> NeuralFlowMap:
    import copy

    return copy.deepcopy(flow_map)


def gradient(method, up: Update) -> torch.Tensor:
    terms = method.loss(up)
    grads = torch.autograd.grad(terms["loss"], list(up.tuned.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(p.numel()).to(p) if g is None else g.flatten() for p, g in zip(up.tuned.parameters(), grads)])


@pytest.fixture
def flow_map(random_map):
    return random_map(dim=3)


def test_the_default_trains_the_first_jump_and_passes_the_gradient_through_the_frozen_last(flow_map):
    """By hand: grad of r(X_ref_{m,1}(X_{0,m}(x_0)))."""
    up, method = update(flow_map), Direct(jitter=0.0)
    x0 = Noise(range(8)).normal((3,), torch.empty(0, dtype=torch.float64))
    up.noise = Noise(range(8))
    found = gradient(method, up)
    x1 = up.reference.jump(up.tuned.jump(x0, 0.0, 0.5), 0.5, 1.0)
    expected = torch.autograd.grad(-linear(x1).mean(), list(up.tuned.parameters()), allow_unused=True)
    flat = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(up.tuned.parameters(), expected)]
    )
    assert torch.allclose(found, flat, atol=1e-5)  # noise is drawn in float32


@pytest.mark.parametrize(
    "method", [Direct(), DRaFT(), DRaFTK(), DRaFTLV(), AlignProp(), ReFL(), DRTune()], ids=lambda m: type(m).__name__
)
def test_every_preset_has_a_gradient_and_counts_its_calls(flow_map, method):
    up = update(flow_map, control=0.5)
    with Ledger() as ledger:
        found = gradient(method, up)
    assert found.isfinite().all() and found.norm() > 0
    assert ledger.cost.reward_calls == 8 * max(1, method.averages)
    assert ledger.cost.forwards >= 8 * method.jumps


def test_the_whole_chain_is_what_autograd_says(flow_map):
    up = update(flow_map)
    found = gradient(DRaFT(jumps=3), up)
    x = Noise(range(8)).normal((3,), torch.empty(0, dtype=torch.float64))
    for s, t in zip((0, 1 / 3, 2 / 3), (1 / 3, 2 / 3, 1.0)):
        x = up.tuned.jump(x, s, t)
    expected = torch.autograd.grad(-linear(x).mean(), list(up.tuned.parameters()), allow_unused=True)
    flat = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(up.tuned.parameters(), expected)]
    )
    assert torch.allclose(found, flat, atol=1e-5)


def test_checkpointing_changes_nothing(flow_map):
    plain = gradient(DRaFT(), update(flow_map, 0.3))
    again = gradient(DRaFT(checkpoint=True), update(flow_map, 0.3))
    assert torch.equal(plain, again)


def test_at_the_base_the_control_cost_is_zero_and_has_no_gradient(flow_map):
    terms = Direct().loss(update(flow_map, control=7.0))
    assert terms["control_cost"].item() == 0
    free, held = gradient(Direct(), update(flow_map, 0.0)), gradient(Direct(), update(flow_map, 7.0))
    assert torch.allclose(free, held, atol=1e-12)


def test_without_a_path_gradient_only_the_jump_itself_counts(flow_map):
    """a = 0: the last jump's gradient equals DRaFT-1's; earlier ones reach the sample by the identity alone."""
    up = update(flow_map)
    found = gradient(DRTune(jumps=1), up)
    assert torch.allclose(found, gradient(DRaFT(jumps=1), update(flow_map)), atol=1e-12)


def test_rewards_above_the_ceiling_do_not_count(flow_map):
    assert gradient(ReFL(ceiling=-1e6), update(flow_map)).norm() == 0


def test_more_noise_averages_have_less_variance(flow_map):
    def spread(n: int) -> float:
        found = []
        for seed in range(60):
            up = update(flow_map, step=seed, b=1)
            up.noise = Noise([0])  # the same sample
            x = up.normal()
            up.noise = Noise([1000 + seed])
            method = DRaFTLV(averages=n)
            loss = method._over_copies(up, x, 0.75, x.new_zeros(1))["loss"]
            found.append(
                torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(loss, list(up.tuned.parameters()), allow_unused=True)
                        if g is not None
                    ]
                )
            )
        return torch.stack(found).var(0).sum().item()

    assert 2.5 < spread(1) / spread(4) < 6.4  # 4 expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jumps": 0}, "jumps=0: must be at least 1"),
        ({"trained": (3,)}, "no jump 3"),
        ({"jitter": 0.7}, "jitter"),
        ({"mix": 2.0}, "mix"),
        ({"truncate": 1}, "no gradient"),
        ({"power": 0.0}, "power"),
    ],
)
def test_bad_knobs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Direct(**options)
