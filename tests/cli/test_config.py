"""Configurations: precedence, names with arguments, and errors that name the fix in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from steerfm.cli import config
from steerfm.cli.config import (
    EvaluateConfig,
    SampleConfig,
    SteerConfig,
    TrainConfig,
)
from steerfm.cli.loading import (
    dump,
    find_recipe,
    load,
    plain,
    recipes,
    sequence,
)
from steerfm.registry import split_spec
from steerfm.trust import nearest
from steerfm.values import ConfigError

SCHEMAS = {"train": TrainConfig, "sample": SampleConfig, "steer": SteerConfig, "evaluate": EvaluateConfig}
CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [
    (kind, path) for kind in SCHEMAS for path in sorted((CONFIGS / kind).glob("*.yaml"))
]  # folders without a schema here belong to other commands


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


# --- precedence ------------------------------------------------------------------------------------------------------
def test_defaults():
    assert load(TrainConfig) == TrainConfig()
    assert load(SteerConfig) == SteerConfig()


def test_the_command_line_wins_over_yaml_over_defaults(write):
    source = write("seed: 3\nname: mine\noptimizer: {lr: 0.5, steps: 7}\n")
    c = load(TrainConfig, source, ["optimizer.lr=0.25", "data.batch_size=9", "name=yours", "name=ours"])
    assert (c.seed, c.name) == (3, "ours")
    assert (c.optimizer.lr, c.optimizer.steps, c.optimizer.beta1) == (0.25, 7, 0.9)
    assert (c.data.batch_size, c.data.name) == (9, "fashion")


def test_values_have_the_types_of_the_schema():
    c = load(SteerConfig, None, ["strength=5", "n=3", "label=3", "lookaheads=false", "out=runs/a=b"])
    assert (c.strength, c.n, c.label, c.lookaheads, c.out) == (5.0, 3, "3", False, "runs/a=b")
    assert isinstance(c.strength, float)
    assert load(SteerConfig, None, ["label=Ankle boot"]).label == "Ankle boot"
    assert load(SteerConfig, None, ["label=Bag", "label=null"]).label is None
    assert load(EvaluateConfig, None, ["steps=[1,3]"]).steps == [1, 3]
    assert load(TrainConfig, None, ["optimizer.lr=5e-4"]).optimizer.lr == 5e-4
    assert load(TrainConfig, None, ["network={name: unet, widths: [8, 16]}"]).network == {"name": "unet", "widths": [8, 16]}


def test_dictionaries_merge():
    shares = ["objective.shares={lagrangian: 0.25}", "objective.shares.progressive=0.5"]
    c = load(TrainConfig, None, [*shares, "network.channels=1"])
    assert c.objective.shares == {"lagrangian": 0.25, "progressive": 0.5}
    assert c.network == {"name": "unet", "channels": 1}


# --- names with arguments --------------------------------------------------------------------------------------------
def test_a_name_and_its_arguments():
    c = load(SteerConfig, None, ["reward=classifier", "reward.target=Bag", "method.particles=4", "judge=sharpness"])
    assert c.reward == {"name": "classifier", "target": "Bag"}
    assert c.method == {"name": "funnel", "particles": 4}
    assert c.judge == {"name": "sharpness"}
    assert split_spec(c.reward, "reward") == ("classifier", {"target": "Bag"})


def test_a_new_name_drops_the_arguments_of_the_old(write):
    source = write("reward: {name: classifier, target: Bag, temperature: 2}\nmethod: {name: dps, scale: 3}\n")
    c = load(SteerConfig, source, ["reward=brightness", "reward.region=top"])
    assert c.reward == {"name": "brightness", "region": "top"}
    assert c.method == {"name": "dps", "scale": 3}
    assert load(SteerConfig, source, ["reward.target=Coat"]).reward == {
        "name": "classifier", "target": "Coat", "temperature": 2,
    }  # fmt: skip
    assert load(SteerConfig, source, ["reward={name: classifier}"]).reward == {"name": "classifier"}


@pytest.mark.parametrize("where", ["yaml", "command line"])
def test_a_list_of_weighted_terms(write, where):
    terms = "[{name: classifier, target: Bag}, {name: sharpness, weight: 0.2}]"
    c = load(SteerConfig, write(f"reward: {terms}")) if where == "yaml" else load(SteerConfig, None, [f"reward={terms}"])
    assert c.reward == [{"name": "classifier", "target": "Bag"}, {"name": "sharpness", "weight": 0.2}]
    assert load(SteerConfig, None, [f"reward={terms}", "reward=brightness"]).reward == {"name": "brightness"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "auto"),
        (["judge=null"], None),
        (["judge=auto"], "auto"),
        (["judge=sharpness", "judge=auto"], "auto"),
        (["judge=sharpness", "judge=null"], None),
        (["judge=null", "judge=sharpness"], {"name": "sharpness"}),
        (["judge={name: classifier, target: Bag}"], {"name": "classifier", "target": "Bag"}),
    ],
)
def test_the_judge_may_be_automatic_or_none(overrides, expected):
    assert load(SteerConfig, None, overrides).judge == expected


def test_a_spec_needs_a_name():
    assert split_spec("dps", "method") == ("dps", {})
    for value in ({"target": "Bag"}, 3, None, {"name": 3}, load(SteerConfig, None, ["reward=3"]).reward):
        with pytest.raises(ConfigError, match="reward=NAME"):
            split_spec(value, "reward")


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schema", "overrides", "message"),
    [
        (TrainConfig, ["optimiser.lr=1"], "unknown key 'optimiser' .did you mean 'optimizer'"),
        (TrainConfig, ["optimizer.leraning=1"], r"unknown key 'optimizer\.leraning'.*keys: lr, beta1"),
        (TrainConfig, ["optimizer.warmupp=1"], r"'optimizer\.warmupp' .did you mean 'warmup'"),
        (SteerConfig, ["stength=3"], "did you mean 'strength'"),
        (SteerConfig, ["xyzzy=3"], r"unknown key 'xyzzy'; keys: model"),
        (TrainConfig, ["optimizer.lr=fast"], "optimizer.lr"),
        (TrainConfig, ["optimizer=fast"], "'optimizer' is a section with the keys lr"),
        (TrainConfig, ["seed=null"], "seed"),
        (TrainConfig, ["network=unet"], "network"),
        (TrainConfig, ["objective.shares.lagrangian=much"], "lagrangian"),
        (TrainConfig, ["seed"], "key=value"),
        (TrainConfig, ["=3"], "key=value"),
        (TrainConfig, ["network=[1,"], "cannot read the value"),
        (SteerConfig, ["reward={name:classifier, target: Bag}"], "put a blank after the colon: name: classifier"),
        (TrainConfig, ["name=${nowhere}"], "nowhere"),
        (TrainConfig, ["optimizer.lr.x=1"], "optimizer.lr"),
    ],
)
def test_errors_of_the_command_line(schema, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(schema, None, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not valid yaml"),
        ("a: 1\n\tb: 2", "not valid yaml"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("just words\n", "unknown key .just words"),
        ("oprimizer: {lr: 1}\n", "did you mean 'optimizer'"),
        ("optimizer:\n", "'optimizer' is a section with the keys"),
        ("optimizer: {lr: [1]}\n", "lr"),
    ],
)
def test_errors_in_a_file(write, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(TrainConfig, write(text))
    assert "\n" not in str(error.value)


def test_an_empty_file_means_the_defaults(write):
    assert load(TrainConfig, write("# nothing\n")) == TrainConfig()


def test_unknown_recipes_name_the_known():
    with pytest.raises(ConfigError, match=r"did you mean 'fashion'.*recipes: .*fashion-classifier"):
        load(TrainConfig, "fashon")
    with pytest.raises(ConfigError, match="recipes: none"):
        find_recipe("anything", "no-such-command")


def test_suggestions():
    assert nearest("strenght", ["strength", "seeds"]) == " (did you mean 'strength'?)"
    assert nearest("zzz", ["strength", "seeds"]) == ""


# --- recipes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "path"), SHIPPED, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_every_shipped_recipe_parses(kind, path):
    c = load(SCHEMAS[kind], path.stem)
    assert c == load(SCHEMAS[kind], str(path))
    assert c != SCHEMAS[kind]()  # a recipe that says nothing is not a recipe
    if kind == "train":
        from steerfm.checkpoints import build_network
        from steerfm.training.objectives import OFF_DIAGONAL

        if c.task == "contrastive":
            from steerfm.cli.train import training_module

            told = replace(c, init=None, objective=replace(c.objective, teacher=None))  # of other runs, which are not here
            if c.network.get("text"):
                told = replace(told, network=c.network | {"text": "emoji-clip"})
            assert training_module(told, data=None)[0].network.logit_scale.requires_grad
        else:
            build_network({**c.network, "classes": 10} if c.text is None else {**c.network, "text": 256})
        assert c.objective.shares.keys() <= OFF_DIAGONAL.keys()
        assert sum(c.objective.shares.values()) <= 1
        assert c.name == path.stem


def test_recipes_are_listed():
    assert {"fashion", "fashion-classifier", "fashion-judge"} <= recipes("train").keys()
    assert recipes("no-such-command") == {}


def test_a_file_wins_over_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "fashion").write_text("seed: 99\n")
    monkeypatch.chdir(tmp_path)
    assert load(TrainConfig, "fashion").seed == 99


# --- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schema", "overrides"),
    [
        (TrainConfig, ["optimizer.lr=1e-5", "network={name: mlp, dim: 3}", "out=a b", "objective.shares.eulerian=0.1"]),
        (SteerConfig, ["reward=[{name: classifier}, {name: symmetry, weight: 2}]", "judge=null", "label='3'"]),
        (SteerConfig, ["reward=my_file.py:f", "reward.target=null", "judge=sharpness", "strength=-1e-3"]),
        (SteerConfig, []),
        (SampleConfig, ["label=Ankle boot", "seeds=7"]),
        (EvaluateConfig, ["steps=[3]"]),
    ],
)
def test_dump_and_load(write, schema, overrides):
    c = load(schema, None, overrides)
    assert load(schema, write(dump(c))) == c
    assert plain(c).keys() == schema.__dataclass_fields__.keys()


def test_sequence():
    assert sequence(3) == [3]
    assert sequence([3, 4]) == [3, 4]
    assert sequence("ab") == ["ab"]


def test_every_schema_is_covered_here():
    schemas = {name for name in vars(config) if name.endswith("Config") and name.removesuffix("Config").lower() in SCHEMAS}
    assert schemas == {schema.__name__ for schema in SCHEMAS.values()}


def test_dictionaries_and_omegaconfs_are_taken_as_yaml_is(monkeypatch):
    from omegaconf import OmegaConf

    monkeypatch.setenv("MY_SECRET", "hunter2")
    told = {"n": 3, "reward": {"name": "clip", "prompt": "${oc.env:MY_SECRET}"}, "method": {"name": "funnel", "steps": 2}}
    for source in (told, OmegaConf.create(told)):
        made = load(SteerConfig, source, ["n=5"])
        assert (made.n, made.reward["prompt"], made.method["steps"]) == (5, "${oc.env:MY_SECRET}", 2)
    with pytest.raises(ConfigError, match="unknown key 'm'; keys: model"):
        load(SteerConfig, OmegaConf.create({"m": 3}))
