"""What several test files share: data that may be missing, seeded generators, networks with weights that matter, z-scores."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import fetch
import pytest
import torch
from torch import Tensor, nn

from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import Mlp

# --- data that may be missing --------------------------------------------------------------------------------------------
missing = lru_cache(fetch.missing)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fetch", action="store_true", help="fetch missing data first; not where STEERFM_DATA is set")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "data(name): reads the data set of that name, and is skipped where it is missing")
    asked = config.getoption("--fetch") and not hasattr(config, "workerinput")  # once, not in every worker
    config.failures = fetch.fetch() if asked and not os.environ.get("STEERFM_DATA") else {}  # type: ignore[attr-defined]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("data"):
        if why := missing(*mark.args):
            pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was skipped and why, and why its data could not be fetched."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, n in reasons.most_common():
        terminalreporter.write_line(f"skipped {n}: {reason}")
    for name, why in config.failures.items():  # type: ignore[attr-defined]
        terminalreporter.write_line(f"could not fetch the data of {name}: {why}")


# --- numbers -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """Networks start with an output of zero: this makes every parameter random, so that every path carries something."""

    def randomise(network: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in network.parameters():
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.copy_(scale * noise / max(1.0, p[0].numel() / 4) ** 0.5)
        return network

    return randomise


@pytest.fixture
def random_map(randomise) -> Callable[..., NeuralFlowMap]:
    """A small map of vectors with random weights, in float64: a flow map in form only."""

    def random_map(dim: int = 3, classes: int = 0, posterior: bool = False, **options) -> NeuralFlowMap:
        names = tuple("abcdefgh"[:classes])
        network = randomise(Mlp(dim, width=16, depth=2, classes=classes, posterior=posterior), scale=0.8)
        options = {"mean": 0.3, "std": 0.7, "class_names": names} | options
        return NeuralFlowMap(network, (dim,), **options).double().eval()

    return random_map


@pytest.fixture(scope="session")
def z_score() -> Callable[..., Tensor]:
    """z-scores of the mean of independent rows (n, ...) against its expectation."""

    def z_score(rows: Tensor, expected: Tensor | float = 0.0) -> Tensor:
        rows = rows.double()
        return (rows.mean(0) - expected) / (rows.std(0) / len(rows) ** 0.5)

    return z_score
