"""Random command lines: whatever is typed, the answer is a result or one line, never a traceback.

More of them: FUZZ=100 pytest tests/cli/test_fuzz.py
"""

from __future__ import annotations

import gzip
import os
import random
import signal
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import numpy as np
import pytest

from steerfm import cli, finetuning, rewards
from steerfm.cli.config import BenchConfig
from steerfm.steering import METHODS

LINES = int(os.environ.get("FUZZ", "4"))
SECONDS = 20

WORDS = [
    "", "0", "-1", "1", "2", "3", "1.5", ".5", "-0.0", "1e-3", "nan", "inf", "-inf", "null", "~", "true", "no", "on",
    "abc", "007", "[]", "[1]", "[0]", "[a, b]", "[1, x]", "[", "{", "{}", "{a: 1}", "{name: x}", "{name: brightness}",
    "[{name: brightness}]", "[bold]x", "[/10]", "a dog #1", "family: man, woman", "${oc.env:HOME}", "../x", "x.txt",
    "x.csv", "x.py:f", "Bag", "all", "auto", "cpu", "fashion", "emoji", "brightness", "clip", "direct",
    "funnel", "best_of_n", "32", "bf16", "16-true", "bf16-mixed", "\u2764", " ", "a" * 300, "a=b", "'", '"', "\\",
    "!x", "&a", "*a", "2001-01-01", "3/2", "1/1",
]  # fmt: skip

SANE = ["1", "2", "3", "0.5", "null", "true", "brightness", "Bag", "cpu", "renoise", "map", "[1]", "{scale: 2}"]

BASE = {
    "sample": ["n=1", "steps=1"],
    "steer": ["n=1", "reward=brightness", "method=best_of_n", "method.particles=2", "method.steps=1", "judge=null"],
    "finetune": [
        "reward=brightness", "judge=null", "batch_size=2", "optimizer.steps=1", "optimizer.warmup=1", "distil.steps=1",
        "distil.samples=4", "distil.batch_size=2", "watch.n=4", "watch.base=8", "watch.every=1", "label=Bag",
    ],
    "evaluate": ["n=4", "steps=[1]", "euler=1", "batch_size=4", "posteriors=1"],
    "train": [
        "data.root=data", "data.batch_size=4", "network={name: unet, widths: [8], attention: false}", "optimizer.steps=1",
        "trainer.validate_every=0", "trainer.sample_every=0", "trainer.accelerator=cpu",
    ],
    "bench": ["methods={best_of_n: {steps: 1}}", "budgets=[2]", "seeds=4", "n=1", "strengths=[1]"],
}  # fmt: skip


def keys(schema, prefix: str = "") -> list[str]:
    """Dotted keys of a schema."""
    out = []
    for f in fields(schema):
        kind = get_type_hints(schema)[f.name]
        out += keys(kind, f"{prefix}{f.name}.") if is_dataclass(kind) else [f"{prefix}{f.name}"]
    return out


def key(draw: random.Random, command: str) -> str:
    known = keys(BenchConfig if command == "bench" else cli.SCHEMAS[command])
    more = []
    if command in ("steer", "finetune"):
        methods: Mapping[str, Any] = METHODS if command == "steer" else finetuning.METHODS
        made = [f.name for kind in methods.values() for f in fields(kind)]
        more = [
            f"method.{draw.choice(made)}",
            f"method.{draw.choice(made)}.scale",
            "reward.target",
            "reward.prompt",
            "reward.x",
        ]
        more += ["judge.prompt", "reward.name", "method.name", "reward.weight", "method"]
    elif command == "bench":
        more = ["problems.easy.label", "problems.easy.reward", "problems.easy.prompt", "methods.x", "methods.funnel.first"]
    elif command == "train":
        more = ["network.name", "network.widths", "network.x", "objective.shares.lagrangian", "objective.shares.x"]
    chosen = draw.choice([*known, *more])
    return draw.choice([chosen] * 12 + [chosen[:-1], f"{chosen}.x", chosen.upper(), f".{chosen}", ""])


def line(draw: random.Random, command: str) -> list[str]:
    """A command line that is not meant to work for long."""
    if command in ("rewards", "methods", "models"):
        known = [*rewards.available(), *METHODS, *finetuning.METHODS]
        return [command, *(draw.choice([*known, *(word for word in WORDS if word)]) for _ in range(draw.randint(0, 2)))]
    given = BASE[command] if draw.random() < 0.9 else BASE[command][: len(BASE[command]) // 2 + 1]
    words = [f"{key(draw, command)}={draw.choice(draw.choice([WORDS, SANE]))}" for _ in range(draw.randint(1, 3))]
    words += [draw.choice(WORDS)] if draw.random() < 0.05 else []
    begin = ["bench", draw.choice(["quick"] * 6 + ["x"])] if command == "bench" else [command]
    return [*begin, *given, f"out=run{draw.randint(0, 10**9)}", *words]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name, n in {"train": 16, "t10k": 8}.items():
        pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28)).astype(np.uint8)
        for kind, content in {"images-idx3": pixels, "labels-idx1": np.arange(n, dtype=np.uint8) % 10}.items():
            head = bytes([0, 0, 8, content.ndim]) + b"".join(size.to_bytes(4, "big") for size in content.shape)
            with gzip.open(tmp_path / "data" / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + content.tobytes())
    return tmp_path


@pytest.mark.parametrize("command", [*BASE, "rewards", "methods", "models"])
@pytest.mark.parametrize("seed", range(LINES))
def test_a_random_command_line_has_no_traceback(capsys, place, command, seed):
    argv = line(random.Random(f"{command} {seed}"), command)

    late_at: list[str] = []

    def late(*_: object) -> None:
        late_at.append("here")
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        code = cli.main(argv)
    except TimeoutError:
        pytest.skip(f"long: {argv}")
    except SystemExit as error:
        code = error.code
    except Exception as error:
        if late_at:  # a compiler wraps what it catches
            pytest.skip(f"long: {argv}")
        raise AssertionError(f"{argv}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    err = capsys.readouterr().err
    assert code in (0, 1, 2), argv
    assert code != 2 or "error: " in err.splitlines()[-1], (argv, err)
