"""Ensembles from end to end: asked for, chosen for their accuracy, and answered without a member that failed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
from aiohttp.test_utils import TestClient, TestServer
from serving import LARGE, LARGE_ACCURACY, SMALL, image_array
from torch import Tensor

import slackfit
from engine import Engine, Network
from profiletable import Choice, Ensemble, Latencies
from superserve import SERVE, SuperServe, make_app
from web.errors import DeadlineExceeded

PAIR = f"{SMALL}+{LARGE}"
PAIR_ACCURACY = 0.97
PIXELS = image_array(0).tobytes()


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny servable with an ensemble of its two subnets, which takes as long as both."""
    folder = serving.write_servable(tmp_path_factory.mktemp("paired"))
    pair = Ensemble(members=(SMALL, LARGE), combination="mean", weights=(0.5, 0.5))
    choice = Choice(
        name=pair.name, kind="ensemble", accuracy=PAIR_ACCURACY, accuracy_samples=1000, test_accuracy=None,
        parameters=2000, macs=2000, frontier=True, ensemble=pair,
    )  # fmt: skip
    slackfit.save_choices(folder, [*serving.choices(), choice])
    latencies = serving.latencies()
    both_s = tuple(map(sum, zip(*(each.p50_s for each in latencies.values()), strict=True)))
    slower_s = tuple(1.1 * each_s for each_s in both_s)
    latencies[pair.name] = Latencies(
        p50_s=both_s, p99_s=both_s, modes=("serial",) * len(both_s), serial_p50_s=both_s, parallel_p50_s=slower_s
    )
    (path,) = folder.glob("latency-*.json")
    device = slackfit.load_latencies(path, serving.choices()).device
    assert device is not None
    slackfit.save_latencies(path, device, serving.SIZES, latencies)
    return folder


@dataclass
class Running:
    """A server, and a client of it."""

    client: TestClient[Any, Any]
    serve: SuperServe


@pytest.fixture
async def running(paired: Path) -> AsyncIterator[Running]:
    app = make_app(serving.config_of(paired, correction=False))
    await app[SERVE].start_soon()
    async with TestClient(TestServer(app)) as client:
        yield Running(client, app[SERVE])


async def told(running: Running, query: str = "", status: int = 200) -> dict[str, Any]:
    response = await running.client.post(f"/predict{query}", data=PIXELS)
    document: dict[str, Any] = await response.json()
    assert response.status == status, document
    return document


async def test_who_asks_for_members_gets_the_mean_of_what_they_say(running: Running) -> None:
    replies = [await running.serve.infer(image_array(0), members=[name]) for name in (SMALL, LARGE)]
    pair = await running.serve.infer(image_array(0), members=[LARGE, SMALL])
    assert [reply.subnet for reply in (*replies, pair)] == [SMALL, LARGE, PAIR]
    mean = (replies[0].probabilities + replies[1].probabilities) / 2
    np.testing.assert_allclose(pair.probabilities, mean, atol=1e-5)
    document = await told(running, f"?members={LARGE},{SMALL}")
    assert (document["subnet"], document["members"], document["accuracy"]) == (PAIR, [SMALL, LARGE], PAIR_ACCURACY)
    assert "degraded" not in document


async def test_a_floor_above_every_subnet_is_met_by_an_ensemble_if_there_is_time(running: Running) -> None:
    floor = (LARGE_ACCURACY + PAIR_ACCURACY) / 2
    assert (await told(running, f"?min_accuracy={floor}"))["subnet"] == PAIR
    assert (await told(running, f"?min_accuracy={floor}&slo_ms=0.01", 504))["reason"] == DeadlineExceeded.reason
    assert "above the most accurate choice" in (await told(running, "?min_accuracy=0.99", 400))["error"]
    assert "are no choice; there are: " in (await told(running, "?members=somebody", 400))["error"]


async def test_the_rest_answers_for_a_member_that_failed_says_so_and_is_counted(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(name: str, network: Network) -> Network:
        def broken(*_: Tensor) -> Tensor:
            raise ValueError("broken")

        return broken if name == LARGE else network

    alone = await running.serve.infer(image_array(0), members=[SMALL])
    monkeypatch.setattr(Engine, "faults", staticmethod(faults))
    document = await told(running, f"?members={PAIR.replace('+', ',')}&top_k=5")
    assert document["degraded"] is True
    assert (document["subnet"], document["accuracy"]) == (SMALL, alone.accuracy)
    assert "members" not in document
    found = {each["index"]: each["probability"] for each in document["predictions"]}
    np.testing.assert_allclose([found[index] for index in range(5)], alone.probabilities, rtol=2e-3)
    text = running.serve.metrics.text().decode()
    assert "superserve_degraded_total 1.0" in text
    assert "superserve_failed_batches_total 0.0" in text


async def test_streams_and_the_open_inference_protocol_take_members_too(running: Running) -> None:
    async with running.client.ws_connect("/stream") as socket:
        header = json.dumps({"id": 1, "members": PAIR, "dtype": "uint8", "shape": list(image_array(0).shape)}).encode()
        await socket.send_bytes(len(header).to_bytes(4, "little") + header + PIXELS)
        async with asyncio.timeout(30):
            document = json.loads(await socket.receive_str())
    assert (document["subnet"], document["members"]) == (PAIR, [SMALL, LARGE])
    tensor = {"name": "input", "datatype": "UINT8", "shape": [1, *image_array(0).shape]}
    body = {"parameters": {"members": PAIR}, "inputs": [tensor | {"data": image_array(0).ravel().tolist()}]}
    response = await running.client.post("/v2/models/tiny/infer", json=body)
    found = await response.json()
    assert response.status == 200, found
    assert found["parameters"]["subnet"] == PAIR


async def test_the_profile_tells_how_and_why_members_run(running: Running) -> None:
    document = await (await running.client.get("/profile")).json()
    entry = next(entry for entry in document["entries"] if entry["name"] == PAIR)
    assert set(entry["mode"]) == {"serial"}
    assert "serial" in entry["why"] or "fills" in entry["why"]
