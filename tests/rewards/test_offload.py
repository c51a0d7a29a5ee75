"""A reward whose network leaves the accelerator between calls, and PickScore's two names of its folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steerfm_rewards.late import LateReward
from torch import Tensor, nn

import steerfm
from steerfm import rewards
from steerfm.rewards import RewardError
from tests.contracts.reward_helpers import clip_folder


class Late(LateReward):
    """Mean of a picture by a network; remembers where that was asked to be."""

    name, unit, range = "late", "mean", (0.0, 1.0)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.places = [nn.Linear(1, 1, bias=False)], list[str]()
        nn.init.constant_(self.net[0].weight, scale)

    def load(self) -> nn.Module:
        return self.net[0]

    def network(self, device: torch.device | str = "cpu") -> Any:
        self.places.append(str(device))
        return super().network("cpu")

    def score(self, images: Tensor, prompts: Any = None, labels: Any = None) -> Tensor:
        self.network("accelerator")
        return self.net[0](images.mean((1, 2, 3)).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("batch", [None, 2])
def test_it_leaves_after_each_call_without_a_gradient(batch):
    reward, x = steerfm.reward(Late, offload=True), torch.rand(5, 3, 4, 4)
    assert isinstance(reward, Late)
    reward.batch_size = batch
    with torch.no_grad():
        for _ in range(2):
            reward(x)
    calls = 3 if batch else 1
    assert reward.places == [*["accelerator"] * calls, "cpu"] * 2
    reward.places.clear()
    reward(x.requires_grad_()).sum().backward()
    assert "cpu" not in reward.places and x.grad is not None  # the way back needs it


def test_it_stays_where_nobody_asked_and_in_sums_each_decides_for_itself():
    x = torch.rand(2, 3, 4, 4)
    stays, goes = steerfm.reward(Late), rewards.reward(Late, offload=True, scale=2.0)
    assert isinstance(stays, Late) and isinstance(goes, Late)
    with torch.no_grad():
        total = (stays + 0.5 * goes)(x)
    torch.testing.assert_close(total, 2 * x.mean((1, 2, 3)))
    assert stays.places == ["accelerator"] and goes.places == ["accelerator", "cpu"]
    assert not rewards.reward(Late, offload=False).offloads  # type: ignore[attr-defined]


def test_configurations_have_it_and_a_reward_without_a_network_refuses_it():
    assert rewards.build({"name": "clip", "prompt": "a cat", "offload": True}).offloads  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="'brightness' cannot be offloaded"):
        rewards.build({"name": "brightness", "offload": True})


def test_the_folder_of_pickscore_has_two_names():
    folder, x = clip_folder(), torch.rand(2, 3, 32, 32)
    scores = [steerfm.reward("pickscore", prompt="red heart", **{name: folder})(x) for name in ("folder", "model")]
    assert torch.equal(*scores)
    with pytest.raises(RewardError, match="needs a folder: give folder="):
        steerfm.reward("pickscore")
    with pytest.raises(RewardError, match="two folders"):
        steerfm.reward("pickscore", folder=folder, model=folder)
