"""What ``--help`` says of every key, ``python -m steerfm``, and what is reachable from ``steerfm``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass

import pytest

from steerfm import cli, values
from steerfm.cli import config, loading
from steerfm.values import ConfigError, Words, count, option, section, type_words

SCHEMAS = [
    kind
    for kind in vars(config).values()
    if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == config.__name__
]


def said(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_key_has_a_doc(schema):
    for f in fields(schema):
        doc = f.metadata.get("doc")
        assert isinstance(doc, str) and doc.strip() == doc and len(doc) > 5 and "\n" not in doc, f.name


@pytest.mark.parametrize("command", cli.SCHEMAS)
def test_help_says_each_key_in_a_line(capsys, command):
    block = said(capsys, command).partition("meaning and values:\n")[2].partition("\n\n")[0]
    lines = [line.strip() for line in block.splitlines()]
    keys = list(loading.keys(cli.SCHEMAS[command]))
    assert len(lines) == len(keys)
    for key, f, kind, default in keys:
        if is_dataclass(kind):
            (line,) = [line for line in lines if line.startswith(f"{key}. ")]
            continue
        (line,) = [line for line in lines if line.startswith(f"{key}=")]
        rest = line.removeprefix(f"{key}=")
        assert f.metadata["doc"] in rest and line.endswith(")")
        written = rest.partition("  ")[0].strip("'")  # what stands there is read back as the default
        assert written == "null" if default is None else written
        if default is None and kind == Words:
            continue  # in a prompt, null is a word
        value: object = loading.load(cli.SCHEMAS[command], None, [f"{key}={written}"])
        for part in key.split("."):
            value = getattr(value, part)
        assert value == default, key


def test_help_of_a_suite_says_its_keys_and_its_content(capsys):
    assert cli.main(["bench", "quick", "--help"]) == 0
    out = capsys.readouterr().out
    for key, f, *_ in loading.keys(config.BenchConfig):
        assert f"{key}=" in out and f.metadata["doc"] in out
    assert "problems:" in out


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "whole number"), (float, "number"), (bool, "true or false"), (str | None, "text, or null"),
        (list[int], "list of whole numbers"), (str | list[str] | None, "text or list of texts, or null"),
        (dict[str, float], "{name: number}"),
    ],
)  # fmt: skip
def test_types_in_plain_words(kind, words):
    assert type_words(kind) == words


def test_ranges_choices_and_sections_are_said_too():
    @dataclass
    class Inner:
        """Things inside."""

        often: int = count(3, "step", "how often, in steps")

    @dataclass
    class Outer:
        """A thing."""

        rate: float = values.ranged(0.5, "how fast", above=0, below=1)
        rank: int = values.ranged(0, "how wide", least=2, off=True)
        colour: str = values.choice("red", "green", doc="of the thing")
        names: list[str] = option(["a", "b c"], "who is in it")
        inner: Inner = section(Inner)

    Outer.__annotations__["inner"] = Inner  # as it is not at the top of the module
    lines = [" ".join(line.split()) for line in loading.explain(Outer).splitlines()]
    assert lines == [
        "rate=0.5 how fast (number, above 0 and below 1)",
        "rank=0 how wide (whole number, 0, or at least 2)",
        "colour=red of the thing (red | green)",
        "names=[a, b c] who is in it (list of texts)",
        "inner. Things inside",
        "inner.often=3 how often, in steps (whole number, at least 1)",
    ]
    assert Outer().names is not Outer().names


def test_the_module_runs_as_the_command():
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "steerfm", *argv], capture_output=True, text=True, check=False)

    shown = run("steer", "--show", "strength=3")
    assert shown.returncode == 0 and "strength: 3.0\n" in shown.stdout
    assert run("--help").stdout.startswith("usage: steerfm ")
    wrong = run("steer", "strenght=3")
    assert wrong.returncode == 2 and "did you mean 'strength'" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_help_waits_for_nothing_heavy():
    slow = ("torch", "lightning", "omegaconf", "matplotlib", "numpy", "rich")
    code = f"import sys; from steerfm import cli; cli.parser().format_help(); print([m for m in {slow} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_omegaconf_is_still_taken():
    from omegaconf import OmegaConf

    made = loading.load(config.SteerConfig, OmegaConf.create({"n": 3, "reward": {"name": "brightness"}}))
    assert made.n == 3 and made.reward == {"name": "brightness"}
    with pytest.raises(ConfigError, match="did you mean 'strength'"):
        loading.load(config.SteerConfig, OmegaConf.create({"strenght": 3}))
