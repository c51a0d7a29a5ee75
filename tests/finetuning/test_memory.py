"""Low-rank tuning holds one network, and writes what is learnt, not what is frozen."""

import lightning as L
import pytest
import torch

from steerfm.finetuning import Direct, FineTuning, LoRA, Tasks
from steerfm.finetuning.evaluation import Monitor, Panel
from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import Mlp
from steerfm.rewards import as_reward
from steerfm.training import fit

pytest.importorskip("peft")
QUICK = {"accelerator": "cpu", "log_every": 1, "validate_every": 0, "save_every": 2, "progress": False}


def linear(x):
    return x[:, 0]


@pytest.fixture
def base():
    torch.manual_seed(0)
    network = Mlp(2, width=32, depth=2)
    torch.nn.init.normal_(network.outputs.weight, std=0.1)
    return NeuralFlowMap(network, (2,)).eval().requires_grad_(False)


def module(base, steps=4, lora=None, **options):
    lora = LoRA(rank=2) if lora is None else lora
    return FineTuning(base, as_reward(linear), Direct(), batch_size=4, steps=steps, warmup=1, lora=lora, scale=1.0, **options)


def storages(network):
    return {p.untyped_storage().data_ptr() for p in network.parameters()}


def test_tuned_and_averaged_network_share_what_is_frozen_with_the_base(base):
    tuning = module(base)
    frozen = storages(base.network)
    assert frozen <= storages(tuning.network)
    assert frozen <= storages(tuning.ema)
    own = sum(p.numel() for network in (tuning.network, tuning.ema) for p in network.parameters() if p.data_ptr() not in frozen)
    assert own == 2 * sum(p.numel() for p in tuning.network.parameters() if p.requires_grad)
    tuning.double()
    assert storages(base.network) <= storages(tuning.network)  # wherever Lightning moves it


def test_without_adapters_nothing_is_shared(base):
    tuning = FineTuning(base, as_reward(linear), Direct(), batch_size=4)
    assert not storages(base.network) & (storages(tuning.network) | storages(tuning.ema))
    assert not storages(tuning.network) & storages(tuning.ema)


def test_the_base_is_never_changed_and_its_switches_stay(base, tmp_path):
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    base.network.inputs.weight.requires_grad_(True)
    tuning = module(base)
    fit(tuning, tuning.data(), tmp_path, **QUICK)
    assert all(torch.equal(before[name], value) for name, value in base.network.state_dict().items())
    assert base.network.inputs.weight.requires_grad
    assert any(bool((p != 0).any()) for name, p in tuning.network.named_parameters() if "lora_B" in name)


def test_checkpoints_hold_the_adapters_only(base, tmp_path):
    whole = module(base, steps=4)
    fit(whole, whole.data(), tmp_path / "whole", **QUICK)
    checkpoint = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=False)
    names = [name for name, value in checkpoint["state_dict"].items() if value.ndim]
    assert names
    assert all("lora_" in name for name in names)


class KilledError(Exception):
    pass


class Kill(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            raise KilledError


def test_a_killed_run_continues_to_the_same_bits(base, tmp_path):
    whole, killed, again = module(base, steps=5), module(base, steps=5), module(base, steps=5)
    fit(whole, whole.data(), tmp_path / "whole", **QUICK)
    with pytest.raises(KilledError):
        fit(killed, killed.data(), tmp_path / "killed", **QUICK, callbacks=[Kill()])
    trainer = fit(again, again.data(), tmp_path / "killed", **QUICK)
    assert trainer.global_step == 5
    for network, other in ((whole.network, again.network), (whole.ema, again.ema)):
        for name, value in network.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_what_a_monitor_keeps_are_the_adapters(base, tmp_path):
    tasks = Tasks()[torch.zeros(8, dtype=torch.long)]
    panel = Panel(base, as_reward(linear), None, tasks, tasks, lambda x: x)
    tuning = module(base)
    monitor = Monitor(panel, panel.measure(tuning.law()), tmp_path, every=2, patience=0)
    fit(tuning, tuning.data(), tmp_path, **QUICK, callbacks=[monitor])
    assert all("lora_" in name for name in monitor.best_weights)
    want = {name: value.clone() for name, value in tuning.ema.state_dict().items()}
    monitor.restore(tuning)
    assert all(torch.equal(want[name], value) for name, value in tuning.ema.state_dict().items())
