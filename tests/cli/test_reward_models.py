"""A reward's own ``model=`` is an argument of the reward, not a flow map."""

import pytest

from steerfm.cli.config import FinetuneConfig, SteerConfig
from steerfm.cli.loading import load


@pytest.mark.parametrize("schema", [SteerConfig, FinetuneConfig])
@pytest.mark.parametrize("key", ["reward", "judge"])
@pytest.mark.parametrize("name", ["clip", "vlm", "emoji_judge"])
def test_a_rewards_model_stays_a_text(schema, key, name):
    config = load(schema, None, [f"{key}={name}", f"{key}.model=emoji-clip", "model=fashion"])
    assert getattr(config, key)["model"] == "emoji-clip" and config.model == "fashion"
    config = load(schema, None, [f"{key}={{name: {name}, model: emoji-clip}}"])
    assert getattr(config, key)["model"] == "emoji-clip"
