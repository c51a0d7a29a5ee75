"""Digests of what every method draws for fixed seeds, to check whether a change of the code changes any bit.

    steerfm bench draws --record before.json       # on the old code, a minute and a half
    steerfm bench draws --compare before.json      # on the new code, on the same machine: others round differently

Covers all steering methods on the shipped `fashion` map with `classifier` (a gradient, a class, two batches), and on an exact
mixture with a black box, if they take one; the fine-tuning methods for three updates; and plain samples by four transitions. It
uses only the public interface, so it also runs on old code: put the other tree first in PYTHONPATH and run this file. Prints a
line for each difference, then one JSON line; the exit code is 1 if there is any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import steerfm
from steerfm import finetuning
from steerfm.rewards import RewardError
from steerfm.steering import METHODS


def digest(*tensors: Tensor | None) -> str:
    """Return a digest of the shapes and bits of tensors; None counts as a value."""
    out = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            out.update(b"none")
        else:
            values = tensor.detach().to(torch.float64).contiguous()
            out.update(str(tuple(values.shape)).encode() + values.numpy().tobytes())
    return out.hexdigest()[:16]


def bright(x: Tensor) -> Tensor:
    """A black-box reward: it has no gradient."""
    return x.detach().flatten(1).mean(1).sub(0.3).square()


def steering() -> Iterator[tuple[str, str]]:
    fashion, bag = steerfm.load("fashion"), steerfm.reward("classifier", target="Bag")
    mixture = steerfm.GaussianMixture([[-2.0, 0.0], [0.5, 1.0], [2.5, -1.0]], [[0.3, 0.3]] * 3).flow_map(steps=2)
    black_box = steerfm.reward(bright)
    black_box.differentiable = False
    labels = torch.tensor([3, 8, 8])
    for name, method in METHODS.items():
        runs = {
            "fashion": partial(steerfm.steer, fashion, bag, n=3, strength=5.0, cond=labels, batch_size=2),
            "mixture": partial(steerfm.steer, mixture, black_box, n=3, seeds=[7, 5, 2**40], strength=2.0),
        }
        for where, run in runs.items():
            try:
                result = run(method())
            except RewardError:
                yield f"{name}, {where}", "refused"
                continue
            trace = result.trace
            parts = (trace.t, trace.ess, trace.resampled, trace.ancestors, trace.value, trace.guidance_ratio)
            yield (
                f"{name}, {where}",
                digest(result.samples, result.rewards, result.log_weights, result.log_z, *parts)
                + f" {result.cost.forwards} {result.cost.backwards} {result.cost.reward_calls}",
            )


def sampling() -> Iterator[tuple[str, str]]:
    fashion = steerfm.load("fashion")
    for transition in ("jump", "renoise", "diffuse", "bridge"):
        method = steerfm.BestOfN(particles=1, steps=4, transition=transition)
        yield f"sample by {transition}", digest(steerfm.steer(fashion, bright, method, n=4, seeds=11).samples)
    yield "sample", digest(steerfm.sample(fashion, n=5, steps=3, seeds=range(5), cond=torch.arange(5)))


def tuning() -> Iterator[tuple[str, str]]:
    import lightning as L

    for name, method in finetuning.METHODS.items():
        fashion, bag = steerfm.load("fashion"), steerfm.reward("classifier", target="Bag")
        assert isinstance(fashion, steerfm.NeuralFlowMap)
        tasks = finetuning.Tasks.of(fashion.condition(["Bag", "Dress"] * 8, 16))
        module = finetuning.FineTuning(fashion, bag, method(), tasks, batch_size=16, control=1.0, steps=3, seed=2)
        trainer = L.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, module.data())
        yield f"tuning by {name}", digest(*module.state_dict().values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench draws", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--record", type=Path, help="write the digests to this file")
    task.add_argument("--compare", type=Path, help="compare with those of a file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import lightning  # noqa: F401  # its import sets the log level

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    draws = {name: value for part in (sampling, steering, tuning) for name, value in part()}
    if options.record:
        options.record.write_text(json.dumps(draws, indent=1) + "\n")
        return print(json.dumps({"benchmark": "draws", "digests": len(draws)}))
    before = json.loads(options.compare.read_text())
    different = [name for name in draws | before if draws.get(name) != before.get(name)]
    for name in different:
        print(f"{name}: {before.get(name, 'missing')} -> {draws.get(name, 'missing')}")
    print(json.dumps({"benchmark": "draws", "digests": len(draws), "different": len(different)}))
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
