"""The cost per picture of every installed reward, with its unit, range and gradient: the table of docs/rewards.md.

    steerfm bench rewards                     # 64 pictures of 32 x 32, one thread, as a markdown table
    steerfm bench rewards --size 64 --n 16

Times are medians of five calls after a warm-up; with a gradient, of call and backward pass together. A reward whose package or
file is missing is listed with what it needs. Then prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from steerfm import rewards

PROMPT = {"prompt": "red heart"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "classifier": {"target": "Bag"},
    "judge": {"target": "Bag"},
    "clip": PROMPT,
    "clip_direction": {"source": "dog face", "to": "cat face"},
    "emoji_judge": PROMPT,
    "ensemble": {"members": [{"name": "clip", **PROMPT}, {"name": "emoji_judge", **PROMPT}]},
    "imagenet": {"target": "wombat"},
    "normalised": {"reward": "sharpness"},
    "ocr": {"text": "HELLO"},
}
NEEDS = {
    "aesthetic": "a head, `head=`",
    "frames": "a reward, `reward=`, and video",
    "hps": "a folder, `folder=`",
    "imagereward": "a folder, `folder=`",
    "objects": "a detector, `detector=`",
    "pickscore": "a model, `model=`",
    "remote": "a server, `url=`",
    "vlm": "a server, `url=`",
}
SHAPES = {"classifier": (1, 28, 28), "judge": (1, 28, 28)}


def measure(reward: rewards.Reward, shape: Sequence[int], n: int) -> tuple[float, float | None]:
    """Return milliseconds per picture, without and with a gradient."""
    pictures = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))

    def milliseconds(gradient: bool) -> float:
        seconds = []
        for _ in range(6):
            x = pictures.clone().requires_grad_(gradient)
            start = time.perf_counter()
            with torch.set_grad_enabled(gradient):
                value = reward(x)
            if gradient:
                value.sum().backward()
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds[1:]) / n

    return milliseconds(False), milliseconds(True) if reward.differentiable else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=32, help="side of the pictures")
    parser.add_argument("--n", type=int, default=64, help="pictures per call")
    parser.add_argument("--names", nargs="*", help="only these")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| reward | unit | range | gradient | ms per picture | with gradient |\n| --- | --- | --- | --- | --- | --- |")
    numbers = {}
    for name in rewards.available():
        if options.names and name not in options.names:
            continue
        try:
            kind = rewards.find(name)
            kind = kind if isinstance(kind, rewards.Reward | type) else rewards.as_reward(kind)  # a plain function
            low, high = kind.range
            cells = f"| `{name}` | {kind.unit} | {low:.3g} to {high:.3g} | {'yes' if kind.differentiable else 'black box'} |"
            if name in NEEDS:
                print(f"{cells} needs {NEEDS[name]} | |")
                continue
            size = options.size
            shape = SHAPES.get(name, (3, size, size))
            reward = rewards.reward(
                name, **ARGUMENTS.get(name, {"target": torch.full(shape, 0.5)} if name == "target_image" else {})
            )
            plain, graph = measure(reward, shape, options.n)
        except (rewards.RewardError, ImportError) as error:
            print(f"| `{name}` | {error} | | | | |")
            continue
        numbers[name] = {"ms": plain, "ms with gradient": graph}
        print(f"{cells} {plain:.2f} | {'' if graph is None else f'{graph:.2f}'} |")
    print(json.dumps({"benchmark": "rewards", "size": options.size, "n": options.n, **numbers}))


if __name__ == "__main__":
    main()
