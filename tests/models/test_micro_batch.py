"""A pipeline with ``micro_batch``: no call of its network, nor of its decoder, gets more rows, whatever is done with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import sure
from torch import Tensor

import steerfm
from steerfm.finetuning import METHOD, FineTuning, LoRA, Tasks, chain
from steerfm.finetuning.evaluation import Panel
from steerfm.metrics.spaces import pixels
from steerfm.models import from_pipeline
from steerfm.models.diffusers import pipeline_map
from steerfm.registry import build
from steerfm.rewards import as_reward
from steerfm.training import fit

pytest.importorskip("diffusers")
from tests.models.pipelines import PIPELINES, relative

pytestmark = pytest.mark.slow
ROWS = 3
QUICK: dict[str, Any] = {"accelerator": "cpu", "log_every": 50, "validate_every": 0, "save_every": 100, "progress": False}


def brightness(images: Tensor) -> Tensor:
    return images.mean(tuple(range(1, images.ndim)))


class Rows:
    """The rows of each call of the network and of the decoder of a map."""

    def __init__(self, fm: Any) -> None:
        of = sure(pipeline_map(fm))
        self.network: list[int] = []
        self.decoder: list[int] = []
        inner: Any = of.network
        inner.register_forward_pre_hook(
            lambda _, args, kwargs: self.network.append(len(args[0] if args else kwargs[of.layout.states])), with_kwargs=True
        )
        sure(of.decoder).register_forward_pre_hook(lambda _, args: self.decoder.append(len(args[0])))


def made(name: str, **arguments: Any) -> tuple[Any, Rows]:
    pipe, call = PIPELINES[name]()
    one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in call.items()}
    fm = from_pipeline(pipe, steps=2, **one, **arguments)
    return fm, Rows(fm)


DOINGS: dict[str, Callable[[Any], Any]] = {
    "sample": lambda fm: fm.decode(steerfm.sample(fm, n=7)),
    "best_of_n": lambda fm: steerfm.steer(fm, brightness, steerfm.BestOfN(particles=4, steps=2), n=2).images(),
    "dps": lambda fm: steerfm.steer(fm, brightness, steerfm.DPS(particles=4, steps=2), n=2).images(),
    "default": lambda fm: steerfm.steer(fm, brightness, n=1).images(),
}


@pytest.mark.parametrize("name", ["sd3", "sdxl ddim", "flux schnell"])
@pytest.mark.parametrize("doing", DOINGS)
def test_sampling_and_steering(name, doing):
    fm, rows = made(name, micro_batch=ROWS)
    DOINGS[doing](fm)
    assert max(rows.network) == ROWS and max(rows.decoder) == ROWS
    plain, _ = made(name)
    x, y = (steerfm.sample(each, n=7) for each in (fm, plain))
    assert relative(x, y) < 1e-5 and relative(fm.decode(x), plain.decode(x)) < 1e-5


@pytest.mark.parametrize("method", ["draft_k", "nft", "orw_cfm"])
def test_tuning_and_its_panel(method, tmp_path: Path):
    pytest.importorskip("peft")
    fm, rows = made("sd3", guidance=1.0, micro_batch=ROWS)
    settings = {"draft_k": {"jumps": 2}, "nft": {"group": 2}, "orw_cfm": {"samples": 8, "jumps": 2}}[method]
    module = FineTuning(
        fm, as_reward(brightness), build({"name": method, **settings}, METHOD), batch_size=8, steps=1, warmup=1,
        lora=LoRA(rank=2), scale=0.05,
    )  # fmt: skip
    fit(module, module.data(), tmp_path, **QUICK)
    tasks = Tasks.of(None)[torch.zeros(8, dtype=torch.long)]
    panel = Panel(fm, as_reward(brightness), None, tasks, tasks.repeat(2), pixels().features)
    panel.measure(chain()(module.averaged()))
    assert max(rows.network) == ROWS and max(rows.decoder) == ROWS


def test_what_is_no_number_of_rows_is_refused():
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"micro_batch={wrong}"):
            made("sd3", micro_batch=wrong)
