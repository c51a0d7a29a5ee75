"""Maps and networks of a file of one's own, in every command: steered, sampled, measured, tuned, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import steerfm
from steerfm import cli
from steerfm.finetuning import LoRA
from steerfm.finetuning.direct import Direct
from steerfm.finetuning.module import FineTuning
from steerfm.flowmap import NeuralFlowMap

HELPER = "WIDTH = 8\n"
MAPS = '''
import torch
from torch import nn

import steerfm
from helper import WIDTH


class Net(nn.Module):
    """x (b, 2), t (b,) to (b, 2): towards (1, 0) and as many more as its weights say."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        for i, p in enumerate(self.parameters()):
            p.data = torch.linspace(-0.5, 0.6, p.numel()).view(p.shape) * (1 + 0.1 * i)

    def forward(self, x, t, cond):
        return x - torch.tensor([1.0, 0.0]).to(x) + self.last(torch.tanh(self.first(torch.cat([x, t.view(-1, 1).to(x)], 1))))


class Jumping(nn.Module):
    """A network for `NeuralFlowMap`, u(x, s, t, cond), with classes if asked."""

    def __init__(self, width=WIDTH, classes=0):
        super().__init__()
        self.net = Net(width)
        self.names = nn.Embedding(classes + 1, 2) if classes else None

    def forward(self, x, s, t, cond):
        flat = x.flatten(1)
        u = self.net(flat[:, :2], s + 0.5 * t, None) * 0.1
        if self.names is not None:
            u = u + self.names.weight[-1:] if cond is None else u + self.names(cond)
        return u.repeat(1, flat.shape[1] // 2).view(x.shape)


class Plain(Jumping):
    def __init__(self, width=WIDTH):
        super().__init__(width)


class Own(steerfm.FlowMap):
    """A map with parts that steerfm does not know: a frozen one among them, a buffer, a number in double precision."""

    def __init__(self, width=WIDTH):
        super().__init__((2,))
        self.net, self.frozen = Net(width), nn.Linear(2, 2).requires_grad_(False)
        nn.init.eye_(self.frozen.weight), nn.init.zeros_(self.frozen.bias)
        self.register_buffer("shift", torch.tensor([0.1, -0.1]))
        self.scale = nn.Parameter(torch.tensor(1 / 3))

    def average_velocity(self, x, s, t, cond):
        return self.scale * self.frozen(-self.net(x, (s + t) / 2, cond)) + self.shift


def make_map(width=WIDTH):
    return steerfm.VelocityModel(Net(width), (2,))


def neural():
    return steerfm.NeuralFlowMap(Jumping(), (2,))


def without_weights():
    return steerfm.VelocityModel(lambda x, t, cond: x, (2,))


def broken():
    raise RuntimeError("no weights\\nat hand")


def key():
    return {}["weights"]


def number():
    return 3


def bare():
    return Net()


one, net, three = Own(), Net(), 3


def right(x):
    return x[:, 0]


def brightness(x):
    return x.mean((1, 2, 3))
'''
MAKERS = ["make_map", "Own", "one", "neural"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "maps.py").write_text(MAPS)
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


TUNE = [
    "finetune", "reward=maps.py:right", "optimizer.steps=2", "optimizer.warmup=0", "batch_size=4", "watch.n=4", "watch.base=8",
    "watch.every=1",
    "distil.steps=1", "distil.samples=4", "distil.batch_size=4", "watch.floor=0", "control=0.1",
    "trainer.log_every=1", "method=draft_k", "method.jumps=2",
]  # fmt: skip


# --- every command ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_every_command_takes_a_map_of_ones_own(here, capsys, maker):
    """`finetune` does in the next test."""
    model = f"model=maps.py:{maker}"
    assert run(capsys, "sample", model, "n=3", "steps=2", "out=sampled")[0] == 0
    samples = load_file(here / "sampled" / "samples.safetensors")["samples"]
    own = steerfm.sample(f"maps.py:{maker}", n=3, steps=2, seeds=0)
    torch.testing.assert_close(samples.flatten(1), own.flatten(1))
    code, _, err = run(
        capsys, "steer", model, "reward=maps.py:right", "method=best_of_n", "method.particles=4", "n=2", "out=steered"
    )
    assert code == 0, err
    code, _, err = run(capsys, "evaluate", model, "n=6", "steps=[1,2]", "euler=3", "batch_size=4", "out=measured")
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize(("maker", "lora"), [(maker, 0) for maker in MAKERS] + [("make_map", 2), ("Own", 2)])
def test_what_was_tuned_loads_to_the_same_bits_in_every_command(here, capsys, maker, lora):
    code, _, err = run(capsys, *TUNE, f"model=maps.py:{maker}", f"lora.rank={lora}", "optimizer.lr=0.05", "out=tuned")
    assert code == 0, err
    file = here / "tuned" / f"maps-{maker}-tuned.safetensors"
    tuned, base, x = steerfm.load(file), steerfm.load(f"maps.py:{maker}"), torch.randn(5, 2)
    assert type(tuned).__name__ == type(base).__name__ and not tuned.training
    stored = load_file(file)
    assert {name: value.dtype for name, value in stored.items()} == {n: v.dtype for n, v in tuned.body.state_dict().items()}
    assert all(value.equal(tuned.body.state_dict()[name]) for name, value in stored.items())
    assert not torch.equal(tuned.jump(x, 0.0, 1.0), base.jump(x, 0.0, 1.0))
    head = json.loads(file.with_suffix(".json").read_text())
    assert head["maker"] == {"name": f"maps.py:{maker}"} and set(head["code"]) == {"maps.py", "helper.py"}
    assert head["card"]["samples"] == f"its own, of maps.py:{maker}"
    if lora:
        adapted = steerfm.load(here / "tuned" / "adapter.safetensors")
        torch.testing.assert_close(adapted.jump(x, 0.0, 1.0), tuned.jump(x, 0.0, 1.0), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(tuned.with_strength(0.0).jump(x, 0.0, 1.0), base.jump(x, 0.0, 1.0))
    assert run(capsys, "steer", f"model={file}", "reward=maps.py:right", "method=best_of_n", "n=1", "out=again")[0] == 0
    code, _, err = run(capsys, *TUNE, f"model={file}", "out=twice")  # and what was tuned is tuned
    assert code == 0, err
    assert steerfm.load(here / "twice" / f"{file.stem}-tuned.safetensors").body.state_dict().keys() == stored.keys()


def test_what_its_author_froze_is_not_tuned(here):
    base = steerfm.load("maps.py:Own")
    module = FineTuning(base, steerfm.reward("maps.py:right"), Direct(), batch_size=2, scale=1.0, steps=1)
    trained = {name for name, parameter in module.network.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("frozen") for name in trained) and "scale" in trained
    everything = steerfm.load("maps.py:Own").requires_grad_(False)
    module = FineTuning(everything, steerfm.reward("maps.py:right"), Direct(), batch_size=2, scale=1.0, steps=1)
    assert all(parameter.requires_grad for parameter in module.network.parameters())
    module = FineTuning(
        base, steerfm.reward("maps.py:right"), Direct(), batch_size=2, scale=1.0, steps=1, lora=LoRA(1, layers=["net.first"])
    )
    assert {n.rpartition(".lora_")[0] for n, p in module.network.named_parameters() if p.requires_grad} == {"net.first"}
    x = torch.randn(3, 2)
    torch.testing.assert_close(module.reference.velocity(x, 0.3), base.velocity(x, 0.3))
    assert module.reference.capabilities == base.capabilities


@pytest.mark.slow
def test_a_velocity_model_that_is_tuned_learns_no_jumps(here, capsys):
    """A velocity is sampled as it was tuned: there are no jumps to distil."""
    weighted = "{name: weighted, samples: 4, rounds: 1, refit: {trajectory: 0}}"
    for i, (method, stages) in enumerate((("draft_k", {"tune"}), (weighted, {"tune"}), ("adjoint", {"tune"}))):
        code, _, err = run(capsys, *TUNE, "model=maps.py:make_map", f"method={method}", "control=1", f"out={i}")
        assert code == 0, err
        lines = [json.loads(line) for line in (here / str(i) / "metrics.jsonl").read_text().splitlines()]
        assert {line["stage"] for line in lines} == stages
        for stage in stages:
            logged = (here / str(i) / stage / "metrics.jsonl").read_text()
            assert "train/jumps" not in logged


# --- Python ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("maker", MAKERS)
def test_saved_in_python_and_loaded(here, maker):
    fm = (
        steerfm.load({"name": f"maps.py:{maker}", "width": 5})
        if maker in ("make_map", "Own")
        else steerfm.load(f"maps.py:{maker}")
    )
    with torch.no_grad():
        for parameter in fm.parameters():
            parameter.add_(1 / 7)
    path, x = fm.save("saved/mine", card={"data": "points"}), torch.randn(3, 2)
    again = steerfm.load(path)
    assert again.jump(x, 0.2, 0.9).equal(fm.jump(x, 0.2, 0.9)) and again.data == "points"
    assert steerfm.load(again.save("saved/other")).jump(x, 0.2, 0.9).equal(fm.jump(x, 0.2, 0.9))


def test_bits_are_kept_in_every_precision(here):
    for dtype in (torch.float64, torch.bfloat16):
        fm = steerfm.load("maps.py:Own").to(dtype)
        with torch.no_grad():
            for parameter in fm.parameters():
                parameter.add_(1 / 7)
        path = fm.save("wide")
        stored = load_file(path)
        assert all(value.dtype == dtype and value.equal(fm.state_dict()[name]) for name, value in stored.items())
        torch.testing.assert_close(
            steerfm.load(path).scale.to(dtype), fm.scale, rtol=0, atol=1e-7 if dtype == torch.float64 else 0
        )


def test_a_map_that_nobody_can_make_again_is_not_saved():
    class Mine(steerfm.FlowMap):
        pass

    with pytest.raises(ValueError, match=r"what makes this Mine again\? architecture="):
        Mine((2,)).save("x")
    with pytest.raises(ValueError, match=r"what makes its network again\? architecture="):
        NeuralFlowMap(torch.nn.Linear(2, 2), (2,)).save("x")


def test_a_shipped_map_is_saved_without_being_told_its_architecture(tmp_path):
    fm, x = steerfm.load("fashion"), torch.randn(2, 1, 28, 28)
    assert isinstance(fm, NeuralFlowMap)
    again = steerfm.load(fm.save(tmp_path / "fashion", half=False))
    assert again.jump(x, 0.0, 1.0).equal(fm.jump(x, 0.0, 1.0)) and again.card["data"] == "fashion"


# --- a network of one's own in training ----------------------------------------------------------------------------------
TRAIN = ["train", "name=mine", "network.width=6", "optimizer.steps=2", "data.batch_size=8",
         "trainer.sample_every=0", "out=trained"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.data("fashion")
@pytest.mark.parametrize(("net", "classes"), [("Jumping", 10), ("Plain", 0)])
def test_a_network_of_ones_own_is_trained_and_loads_in_every_command(here, capsys, net, classes):
    code, _, err = run(capsys, *TRAIN, f"network.name=maps.py:{net}", "data.name=fashion")
    assert code == 0, err
    file = here / "trained" / "mine.safetensors"
    fm = steerfm.load(file)
    assert isinstance(fm, NeuralFlowMap) and type(fm.network).__name__ == net and len(fm.class_names) == classes
    head = json.loads(file.with_suffix(".json").read_text())
    assert head["network"] == {"name": f"maps.py:{net}", "width": 6, **({"classes": 10} if classes else {})}
    assert set(head["code"]) == {"maps.py", "helper.py"}
    assert run(capsys, "sample", f"model={file}", "n=2", "steps=1", "out=sampled", *(["label=Bag"] if classes else []))[0] == 0
    assert run(capsys, "steer", f"model={file}", "reward=maps.py:brightness", "n=1", "method=best_of_n", "out=steered")[0] == 0
    tune = [part for part in TUNE if not part.startswith("reward=")]
    code, _, err = run(capsys, *tune, f"model={file}", "reward=maps.py:brightness", "out=tuned", "judge=null")
    assert code == 0, err
    tuned = steerfm.load(here / "tuned" / "mine-tuned.safetensors")
    assert type(tuned.body).__name__ == net


# --- one line each -----------------------------------------------------------------------------------------------------
COMMANDS = {
    "sample": ["n=1"],
    "steer": ["reward=maps.py:right", "n=1"],
    "evaluate": ["n=2", "steps=[1]"],
    "finetune": TUNE[1:],
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maps.py:make_mapp", "did you mean 'make_map'"),
        ("map.py:make_map", "no such model file: map.py"),
        ("maps.py:broken", "broken fails with RuntimeError: no weights at hand"),
        ("maps.py:key", "KeyError"),
        ("maps.py:number", "makes a int: a FlowMap (steerfm.VelocityModel makes one of a network) is needed"),
        ("maps.py:bare", "makes a Net: a FlowMap (steerfm.VelocityModel"),
        ("maps.py:net", "is not a FlowMap (steerfm.VelocityModel"),
        ("maps.py:Net", "is not a FlowMap (steerfm.VelocityModel"),
        ("maps.py:three", "is not a FlowMap"),
    ],
)
def test_what_makes_no_map_is_one_line_in_every_command(here, capsys, name, words):
    for command, rest in COMMANDS.items():
        code, _, err = run(capsys, command, f"model={name}", *rest)
        assert code == 2 and words in err and err.count("\n") == 1, (command, err)


def test_a_map_without_weights_is_steered_and_not_tuned(here, capsys):
    code, _, err = run(capsys, *TUNE, "model=maps.py:without_weights")
    assert code == 2 and "without parameters cannot be fine-tuned" in err and err.count("\n") == 1
    assert run(capsys, "sample", "model=maps.py:without_weights", "n=1", "out=x")[0] == 0


def saved(here: Path) -> Path:
    return steerfm.load("maps.py:make_map").save(here / "runs" / "mine")


def one_line(capsys, model: Path, words: str) -> None:
    code, _, err = run(capsys, "sample", f"model={model}", "n=1", "out=x", "force=true")
    assert code == 2 and words in err and err.count("\n") == 1, err


def test_a_file_that_moved_changed_or_lost_what_it_imports_is_one_line(here, capsys):
    file, maps = saved(here), here / "maps.py"
    source = maps.read_text()
    maps.rename(here / "moved.py")
    one_line(capsys, file, "needs maps.py, but there is no such file: restore it, or put it next to mine.safetensors")
    (here / "runs" / "maps.py").write_text(source)  # beside the weights, with what it imports
    one_line(capsys, file, "helper.py is missing")
    (here / "runs" / "helper.py").write_text(HELPER)
    assert run(capsys, "sample", f"model={file}", "n=1", "out=x", "force=true")[0] == 0
    maps.write_text(source)
    for changed, text in ((maps, source + "\n# another comment\n"), (here / "helper.py", "WIDTH = 9\n")):
        before = changed.read_text()
        changed.write_text(text)
        one_line(capsys, file, f"{changed.name} has changed since mine.safetensors was written")
        changed.write_text(before)
    maps.write_text(source + "\n# another comment\n")
    head = json.loads(file.with_suffix(".json").read_text())
    del head["code"]
    file.with_suffix(".json").write_text(json.dumps(head))  # as the message says
    assert run(capsys, "sample", f"model={file}", "n=1", "out=x", "force=true")[0] == 0


def test_weights_that_do_not_fit_what_the_code_makes_are_one_line(here, capsys):
    file = saved(here)
    head = json.loads(file.with_suffix(".json").read_text())
    for maker, words in (
        ({"name": "maps.py:make_map", "width": 5}, "the weights do not fit its architecture"),
        ({"name": "maps.py:make_map", "widht": 5}, "did you mean 'width'"),
        ({"name": "maps.py:number"}, "a FlowMap"),
        ({"width": 5}, "name"),
        ("maps.py:make_map", "maker"),
    ):
        file.with_suffix(".json").write_text(json.dumps({**head, "maker": maker}))
        one_line(capsys, file, words)


@pytest.mark.slow
def test_an_adapter_whose_code_changed_is_one_line(here, capsys):
    code, _, err = run(capsys, *TUNE, "model=maps.py:make_map", "lora.rank=1", "out=tuned")
    assert code == 0, err
    (here / "helper.py").write_text("WIDTH = 8  # as before\n")
    one_line(capsys, here / "tuned" / "adapter.safetensors", "helper.py has changed")


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (["network.name=maps.py:Jumpin"], "did you mean 'Jumping'"),
        (["network.name=nets.py:Jumping"], "no such network file: nets.py"),
        (["network.name=maps.py:Jumping", "network.widht=3"], "did you mean 'width'"),
        (["network.name=maps.py:broken"], "broken fails with RuntimeError"),
        (["network.name=maps.py:number"], "a torch.nn.Module is needed"),
        (["network.name=unett"], "unknown network 'unett'"),
    ],
)
@pytest.mark.data("fashion")
def test_what_makes_no_network_is_one_line(here, capsys, network, words):
    code, _, err = run(capsys, "train", "data.name=fashion", *network)
    assert code == 2 and words in err and err.count("\n") == 1, err
