"""Fixtures and helpers that more than one test module uses."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import serving
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import settings

from profiletable import Ensemble
from slackfit import Choice, Latencies, ProfileTable, build_table
from superserve import SERVE, make_app

# Time limits per example would fail on a busy machine; 60 examples keep a property under a quarter of a second.
settings.register_profile("superserve", deadline=None, max_examples=60)
settings.load_profile("superserve")

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# The paper's six ImageNet subnets: accuracy in percent, latency in milliseconds at batch 1 and 16, linear in between.
PAPER = (
    (73.82, 2.0, 7.0),
    (76.69, 2.8, 11.0),
    (77.64, 3.8, 16.3),
    (78.25, 4.1, 17.6),
    (79.44, 4.8, 21.4),
    (80.16, 6.5, 30.0),
)


@pytest.fixture(scope="session")
def table() -> ProfileTable:
    """Table (i) of the policy study: subnets s1 to s6, batches up to 64, latency linear in the batch size."""
    choices, latencies = [], {}
    for number, (percent, one_ms, sixteen_ms) in enumerate(PAPER, start=1):
        choice = Choice(
            name=f"s{number}", kind="subnet", accuracy=percent / 100, accuracy_samples=50_000, test_accuracy=None,
            parameters=number * 1_000_000, macs=number * 1_000_000_000, frontier=True,
        )  # fmt: skip
        each_s = tuple((one_ms + (sixteen_ms - one_ms) / 15 * (size - 1)) / 1e3 for size in BATCH_SIZES)
        choices.append(choice)
        latencies[choice.name] = Latencies(p50_s=each_s, p99_s=each_s)
    return build_table(choices, BATCH_SIZES, latencies)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny servable with a latency table for this device, not to be changed."""
    return serving.write_servable(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def client(profile: Path) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    """A client of a server that is ready."""
    app = make_app(serving.config_of(profile))
    async with TestClient(TestServer(app)) as client:
        await app[SERVE].start_soon()
        yield client


def choice(name: str, accuracy: float, *, frontier: bool = True) -> Choice:
    return Choice(
        name=name, kind="subnet", accuracy=accuracy, accuracy_samples=5000, test_accuracy=accuracy / 2,
        parameters=10, macs=20, frontier=frontier,
    )  # fmt: skip


def ensemble(members: Sequence[str], accuracy: float) -> Choice:
    """An ensemble of these subnets, by the mean of their probabilities."""
    weights = tuple(1 / len(members) for _ in members)
    together = Ensemble(members=tuple(members), combination="mean", weights=weights)
    return replace(choice(together.name, accuracy), kind="ensemble", ensemble=together)


def in_ms(*values_ms: float) -> Latencies:
    each_s = tuple(value_ms / 1e3 for value_ms in values_ms)
    return Latencies(p50_s=each_s, p99_s=each_s)


def table_of(sizes: Sequence[int], *rows: tuple[float, Sequence[float]]) -> ProfileTable:
    """A table from rows of accuracy and latencies in milliseconds; entries are called e0, e1, …"""
    choices = [choice(f"e{index}", accuracy) for index, (accuracy, _) in enumerate(rows)]
    return build_table(choices, sizes, {f"e{index}": in_ms(*row) for index, (_, row) in enumerate(rows)})
