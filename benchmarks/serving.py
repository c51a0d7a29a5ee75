"""The cost of a slow remote reward: servers that sleep score particles while the network continues, or one after the other.

    steerfm bench serving                                  # .2 s per picture and per row of the network: three minutes
    steerfm bench serving --network 0.05 --servers 2

The network is the shipped map of clothes, which sleeps too, like a large network on an accelerator from the processor's view.
Prints the time of the network, of the servers, their sum, and the wall time both ways; the samples must be bit-identical. Then
prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import runpy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import steerfm
from steerfm import shipped, zoo
from steerfm.flowmap import Wrapped


class Slow(Wrapped):
    """A map with a delay.

    Args:
        flow_map: the map.
        seconds: delay for each row of a call.
    """

    def __init__(self, flow_map: steerfm.FlowMap, seconds: float) -> None:
        super().__init__(flow_map)
        self.seconds = seconds

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Any) -> Tensor:
        time.sleep(self.seconds * len(x))
        return super().average_velocity(x, s, t, cond)


class Sleeping(steerfm.Reward):
    """Brightness, with a delay in seconds per picture; ``slept`` is the total delay."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.slept = seconds, 0.0

    def score(self, images: Tensor, prompts: Any = None, labels: Any = None) -> Tensor:
        time.sleep(self.seconds * len(images))
        self.slept += self.seconds * len(images)
        return images.mean((1, 2, 3))


@contextmanager
def serving(rewards: Sequence[steerfm.Reward]) -> Iterator[list[str]]:
    """Serve each reward, and yield the addresses."""
    serve = runpy.run_path(str(shipped.folder("examples") / "reward_server.py"))["serve"]
    servers = [serve(reward, 0) for reward in rewards]
    for server in servers:
        server.RequestHandlerClass.log_message = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pause", type=float, default=0.2, help="delay of a server, in seconds per picture")
    parser.add_argument("--network", type=float, default=0.2, help="delay of the network, in seconds per row")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro-batch", type=int, default=2, help="rows per network call")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    flow_map, method = Slow(zoo.load("fashion"), options.network), steerfm.FeynmanKac(options.particles, options.steps)

    def run(reward: Any) -> tuple[float, Tensor]:
        begin = time.perf_counter()
        result = steerfm.steer(flow_map, reward, method, n=1, label="Bag", strength=20.0, micro_batch=options.micro_batch)
        return time.perf_counter() - begin, result.samples

    judges = [Sleeping(options.pause) for _ in range(options.servers)]
    with serving(judges) as urls:
        remote = steerfm.reward("remote", url=urls, timeout=600.0)

        def waits(images: Tensor) -> Tensor:
            return remote(images)

        waits.differentiable = False  # type: ignore[attr-defined]
        together, ahead = run(remote)
        server = sum(judge.slept for judge in judges) / len(judges)
        turns, behind = run(waits)
    quick = steerfm.reward("brightness")
    quick.differentiable = False
    network, _ = run(quick)
    larger = max(network, server)
    print(
        f"{options.particles} particles, {options.steps} steps, {options.micro_batch} rows per call, {options.servers} servers"
    )
    print(f"network {network:.2f} s, servers {server:.2f} s, sum {network + server:.2f} s")
    print(f"one after the other {turns:.2f} s; at once {together:.2f} s, {together / larger:.2f} of the larger of the two")
    print("the same bits" if torch.equal(ahead, behind) else "OTHER BITS", flush=True)
    seconds = {"network": network, "servers": server, "one after the other": turns, "at once": together}
    print(
        json.dumps(
            {"benchmark": "serving", **vars(options), "seconds": {key: round(value, 3) for key, value in seconds.items()}}
        )
    )


if __name__ == "__main__":
    main()
