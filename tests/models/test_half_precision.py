"""What a network in bfloat16 is given in float32: times and scales of guidance, which half precision has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerfm
from steerfm.models import from_pipeline
from tests.models.pipelines import PIPELINES, relative
from tests.models.test_diffusers import UNGUIDED

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's
NARROW = torch.bfloat16


def made(name: str, narrow: bool, guidance: float | None = None) -> Any:
    pipe, usual = PIPELINES[name]()
    call: dict[str, Any] = usual | UNGUIDED[name] | ({} if guidance is None else {"guidance": guidance})
    if narrow:
        pipe.to(dtype=NARROW)
        call = {key: value.to(NARROW) if "embeds" in key and "mask" not in key else value for key, value in call.items()}
    return from_pipeline(pipe, **call)


def far(name: str, guidance: float | None = None, wide: float | None = None) -> float:
    """How far 64 steps of a network in bfloat16 lead from those in float32, with guidance of its own there."""
    x = steerfm.sample(made(name, True, guidance), n=2, steps=64, seeds=0)
    return relative(x, steerfm.sample(made(name, False, guidance if wide is None else wide), n=2, steps=64, seeds=0))


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("mochi", None), ("aura flow", None), ("chroma", None), ("hunyuan", 3.0), ("hunyuan meanflow", 3.0), ("hunyuan", 3.5)],
)
def test_half_precision_stays_near(name: str, guidance: float | None) -> None:
    """Mochi was given its time in bfloat16, .0107 away, and HunyuanImage 3008 for a guidance of 3000, .014 to .03 away."""
    assert far(name, guidance) < 4e-3


def test_what_is_left_of_flux_is_its_networks_own() -> None:
    """It multiplies its guidance by 1000 in bfloat16 itself: at 3 it computes what is asked for by 3.008."""
    assert far("flux dev", 4.0) < 4e-3
    assert far("flux dev", 3.0) > 1e-2
    assert far("flux dev", 3.0, 3.008) < 4e-3


@pytest.mark.parametrize("name", ["mochi", "qwen", "hunyuan", "anyflow r", "sd3", "sdxl euler"])
def test_times_are_as_exact_as_the_network_takes_them(name: str) -> None:
    """HunyuanImage computes in the precision of the time that it is given, so that its time stays narrow."""
    fm = made(name, True)
    fm = getattr(fm, "flow_map", fm)
    seen: list[dict[str, Any]] = []
    handle = fm.body.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    fm.velocity(steerfm.sampling.Noise([0, 1]).start(fm), 0.3, fm.condition(None, 2))
    handle.remove()
    time = seen[0][fm.layout.time]
    assert (time.dtype == NARROW) == (name == "hunyuan")
    assert seen[0][fm.layout.states].dtype == NARROW
    if name == "hunyuan":
        assert seen[0]["guidance"].dtype == torch.float32 and seen[0]["guidance"].tolist() == [3000.0] * 2
