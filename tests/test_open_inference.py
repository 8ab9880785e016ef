"""The Open Inference Protocol, as an unmodified tritonclient and plain HTTP speak it to a server over real sockets."""

import asyncio
import gzip
import inspect
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ml_dtypes
import numpy as np
import pytest
import serving
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from numpy.typing import NDArray
from serving import (
    CLASSES,
    LARGE,
    SIDE,
    SMALL,
    FakeEngine,
    config_of,
    fake_engine,
    image_array,
    image_file,
    turns_until,
)
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from config import Config
from superserve import ASIDE, SERVE, SuperServe, make_app

ROWS = 5
PIXELS = np.stack([image_array(seed) for seed in range(ROWS)])
PLANES = np.ascontiguousarray((PIXELS.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25, np.float32)
INFER = "/v2/models/tiny/infer"
BODY_LIMIT = 300_000


# -------------------------------------------------------------------------------------------------------------- servers


@dataclass
class Background:
    """A server on a thread of its own, for clients that block."""

    url: str
    serve: SuperServe

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")


@contextmanager
def in_background(config: Config) -> Iterator[Background]:
    app, started, stop = make_app(config), threading.Event(), asyncio.Event()
    found: list[tuple[asyncio.AbstractEventLoop, str]] = []

    async def serve() -> None:
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        await app[SERVE].start_soon()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        found.append((asyncio.get_running_loop(), f"http://127.0.0.1:{port}"))
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(60)
    loop, url = found[0]
    try:
        yield Background(url, app[SERVE])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@pytest.fixture(scope="module")
def server(profile: Path) -> Iterator[Background]:
    with in_background(config_of(profile, max_body_bytes=BODY_LIMIT)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Background) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.host) as client:
        yield client


@dataclass
class Faking:
    """A server in this event loop whose batches wait for ``gate``."""

    client: TestClient[web.Request, web.Application]
    serve: SuperServe
    engine: FakeEngine
    gate: asyncio.Event

    @property
    def counters(self) -> dict[str, int]:
        assert self.serve.dispatcher is not None
        return dict(self.serve.dispatcher.counters)

    def infer(self, rows: int = 1, **settings: Any) -> "asyncio.Task[aiohttp.ClientResponse]":
        return asyncio.create_task(self.client.post(INFER, data=json_body(PIXELS[:rows], **settings)))


@asynccontextmanager
async def faking(config: Config) -> AsyncIterator[Faking]:
    app, gate = make_app(config), asyncio.Event()
    engine = fake_engine(app[SERVE], gate=gate)
    complaints: list[dict[str, Any]] = []
    async with TestClient(TestServer(app)) as client:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await app[SERVE].start_soon()
        try:
            yield Faking(client, app[SERVE], engine, gate)
        finally:
            gate.set()
    assert not complaints


# ------------------------------------------------------------------------------------------------------------- requests


def tensor(array: NDArray[Any], datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput("input", list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def json_body(pixels: NDArray[np.uint8], **members: Any) -> bytes:
    document = {"name": "input", "shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.ravel().tolist()}
    return json.dumps({"inputs": [document], **members}).encode()


def images(*files: bytes) -> NDArray[np.object_]:
    array = np.empty(len(files), np.object_)
    array[:] = files
    return array


async def maybe(result: Any) -> Any:
    """What a call of either client returned."""
    return await result if inspect.isawaitable(result) else result


@asynccontextmanager
async def either(server: Background, kind: str) -> AsyncIterator[Any]:
    """A client of the sync or the aio kind."""
    made = (triton if kind == "sync" else triton_aio).InferenceServerClient(server.host)
    try:
        yield made
    finally:
        await maybe(made.close())


both = pytest.mark.parametrize("kind", ["sync", "aio"])


# ------------------------------------------------------------------------------------- every call that the client makes


def infer_once(client: Any) -> Any:
    return client.infer("tiny", [tensor(PLANES)])


def async_infer_once(client: Any) -> Any:
    return client.async_infer("tiny", [tensor(PLANES)]).get_result()


@dataclass
class Refused:
    """An exception that a call is to end with."""

    status: str
    message: str

    def __call__(self, error: InferenceServerException) -> bool:
        return error.status() == self.status and re.search(self.message, error.message()) is not None


NOT_HERE = Refused("501", "not supported here: no shared memory, no trace or log settings")
METADATA = {
    "name": "tiny",
    "versions": ["1"],
    "platform": "superserve_supernet",
    "inputs": [{"name": "input", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}],
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 5]}],
}


def config_is_complete(config: dict[str, Any]) -> bool:
    return (
        config["max_batch_size"] == 64
        and config["input"] == [{"name": "input", "data_type": "TYPE_UINT8", "dims": [8, 8, 3], "optional": False}]
        and config["output"] == [{"name": "probabilities", "data_type": "TYPE_FP32", "dims": [5]}]
        and config["model_transaction_policy"] == {"decoupled": False}
        and "dynamic_batching" in config
        and "response_cache" not in config
    )


def statistics_are_of_tiny(document: dict[str, Any]) -> bool:
    return [(each["name"], each["version"]) for each in document["model_stats"]] == [("tiny", "1")]


def probabilities_are_right(result: triton.InferResult) -> bool:
    array = result.as_numpy("probabilities")
    return array.shape == (ROWS, 5) and array.dtype == np.float32 and bool(np.allclose(array.sum(1), 1, atol=1e-5))


# method: a call of it, and what must hold of what it returns; or how it is refused
CALLS: dict[str, list[tuple[Callable[[Any], Any], Callable[[Any], bool]]]] = {
    "is_server_live": [(lambda c: c.is_server_live(), lambda live: live is True)],
    "is_server_ready": [(lambda c: c.is_server_ready(), lambda ready: ready is True)],
    "is_model_ready": [
        (lambda c: c.is_model_ready("tiny"), lambda ready: ready is True),
        (lambda c: c.is_model_ready("tiny", "1"), lambda ready: ready is True),
        (lambda c: c.is_model_ready("tiny", "2"), lambda ready: ready is False),
        (lambda c: c.is_model_ready("odd name/x"), lambda ready: ready is False),
    ],
    "get_server_metadata": [
        (lambda c: c.get_server_metadata(), lambda it: it["name"] == "superserve" and "statistics" in it["extensions"])
    ],
    "get_model_metadata": [
        (lambda c: c.get_model_metadata("tiny"), lambda it: it == METADATA),
        (lambda c: c.get_model_metadata("tiny", "1"), lambda it: it == METADATA),
        (lambda c: c.get_model_metadata("odd name"), Refused("404", "unknown model 'odd name'; known: tiny")),
        (lambda c: c.get_model_metadata("tiny", "7"), Refused("404", "unknown version '7' of 'tiny'; known: 1")),
    ],
    "get_model_config": [
        (lambda c: c.get_model_config("tiny"), config_is_complete),
        (lambda c: c.get_model_config("tiny", "1"), config_is_complete),
        (lambda c: c.get_model_config("x"), Refused("404", "unknown model 'x'")),
    ],
    "get_inference_statistics": [
        (lambda c: c.get_inference_statistics(), statistics_are_of_tiny),
        (lambda c: c.get_inference_statistics("tiny"), statistics_are_of_tiny),
        (lambda c: c.get_inference_statistics("tiny", "1"), statistics_are_of_tiny),
        (lambda c: c.get_inference_statistics("x"), Refused("404", "unknown model 'x'")),
    ],
    "get_model_repository_index": [
        (
            lambda c: c.get_model_repository_index(),
            lambda it: it == [{"name": "tiny", "version": "1", "state": "READY", "reason": ""}],
        )
    ],
    "load_model": [
        (lambda c: c.load_model("tiny"), lambda nothing: nothing is None),
        (lambda c: c.load_model("other"), Refused("404", "unknown model 'other'; known: tiny")),
        (lambda c: c.load_model("tiny", config="{}"), Refused("501", "other configurations or files")),
    ],
    "unload_model": [(lambda c: c.unload_model("tiny"), Refused("501", "serves one model and keeps it"))],
    "infer": [
        (infer_once, probabilities_are_right),
        (lambda c: c.infer("tiny", [tensor(PLANES)], "1"), probabilities_are_right),
        (lambda c: c.infer("x", [tensor(PLANES)]), Refused("404", "unknown model 'x'; known: tiny")),
    ],
    "async_infer": [(async_infer_once, probabilities_are_right)],
    "get_trace_settings": [
        (lambda c: c.get_trace_settings(), NOT_HERE),
        (lambda c: c.get_trace_settings("tiny"), NOT_HERE),
    ],
    "update_trace_settings": [
        (lambda c: c.update_trace_settings(settings={"trace_rate": "1"}), NOT_HERE),
        (lambda c: c.update_trace_settings("tiny", {"trace_rate": "1"}), NOT_HERE),
    ],
    "get_log_settings": [(lambda c: c.get_log_settings(), NOT_HERE)],
    "update_log_settings": [(lambda c: c.update_log_settings({"log_info": True}), NOT_HERE)],
    "get_system_shared_memory_status": [
        (lambda c: c.get_system_shared_memory_status(), NOT_HERE),
        (lambda c: c.get_system_shared_memory_status("a"), NOT_HERE),
    ],
    "register_system_shared_memory": [(lambda c: c.register_system_shared_memory("a", "/a", 8), NOT_HERE)],
    "unregister_system_shared_memory": [
        (lambda c: c.unregister_system_shared_memory(), NOT_HERE),
        (lambda c: c.unregister_system_shared_memory("a"), NOT_HERE),
    ],
    "get_cuda_shared_memory_status": [(lambda c: c.get_cuda_shared_memory_status("a"), NOT_HERE)],
    "register_cuda_shared_memory": [(lambda c: c.register_cuda_shared_memory("a", b"handle", 0, 8), NOT_HERE)],
    "unregister_cuda_shared_memory": [(lambda c: c.unregister_cuda_shared_memory(), NOT_HERE)],
}
# Methods that send nothing.
LOCAL = {"close", "plugin", "register_plugin", "unregister_plugin", "generate_request_body", "parse_response_body"}


@both
def test_every_method_of_the_client_is_called_below(kind: str) -> None:
    made = (triton if kind == "sync" else triton_aio).InferenceServerClient
    methods = {name for name, _ in inspect.getmembers(made, callable) if not name.startswith("_")}
    assert methods - LOCAL == CALLS.keys() - ({"async_infer"} if kind == "aio" else set())


@both
@pytest.mark.parametrize("method", CALLS)
async def test_each_call_of_tritonclient_returns_what_it_should(server: Background, kind: str, method: str) -> None:
    if kind == "aio" and method == "async_infer":
        method = "infer"
    async with either(server, kind) as client:
        for call, holds in CALLS[method]:
            if isinstance(holds, Refused):
                with pytest.raises(InferenceServerException) as caught:
                    await maybe(call(client))
                assert holds(caught.value), caught.value
            else:
                result = await maybe(call(client))
                assert holds(result), result


# -------------------------------------------------------------------------------------------------------- input forms


FORMS: dict[str, triton.InferInput] = {
    "FP32 binary": tensor(PLANES),
    "FP32 JSON": tensor(PLANES, binary=False),
    "UINT8 binary": tensor(PIXELS, "UINT8"),
    "UINT8 JSON": tensor(PIXELS, "UINT8", binary=False),
    "FP16 binary": tensor(PLANES.astype(np.float16), "FP16"),
    "BF16 binary": tensor(PLANES.astype(ml_dtypes.bfloat16), "BF16"),
    "BYTES binary": tensor(images(*(image_file("PNG", (9 + i, 8)) for i in range(ROWS))), "BYTES"),
}


@both
@pytest.mark.parametrize("form", FORMS)
async def test_every_form_of_input_is_answered_in_every_form_of_output(
    server: Background, kind: str, form: str
) -> None:
    asked = {
        "default": None,
        "binary": [triton.InferRequestedOutput("probabilities")],
        "JSON": [triton.InferRequestedOutput("probabilities", binary_data=False)],
    }
    answers = {}
    async with either(server, kind) as client:
        for name, outputs in asked.items():
            result = await maybe(client.infer("tiny", [FORMS[form]], outputs=outputs, request_id=f"{form} {name}"))
            response = result.get_response()
            assert response["id"] == f"{form} {name}"
            assert (response["model_name"], response["model_version"]) == ("tiny", "1")
            assert ("data" in response["outputs"][0]) == (name == "JSON")
            assert probabilities_are_right(result)
            answers[name] = result.as_numpy("probabilities")
    np.testing.assert_allclose(answers["binary"], answers["default"], atol=1e-5)
    np.testing.assert_allclose(answers["JSON"], answers["default"], atol=1e-5)


def test_the_forms_of_one_input_agree(client: triton.InferenceServerClient) -> None:
    answers = {
        form: client.infer("tiny", [FORMS[form]]).as_numpy("probabilities") for form in FORMS if form[:5] != "BYTES"
    }
    for form, answer in answers.items():
        tolerance = 0.02 if form.startswith(("FP16", "BF16")) else 1e-4
        np.testing.assert_allclose(answer, answers["FP32 binary"], atol=tolerance, err_msg=form)


def test_rows_come_back_in_order(client: triton.InferenceServerClient) -> None:
    together = client.infer("tiny", [tensor(PIXELS, "UINT8")]).as_numpy("probabilities")
    for row, pixels in zip(together, PIXELS, strict=True):
        alone = client.infer("tiny", [tensor(pixels[None], "UINT8")]).as_numpy("probabilities")
        np.testing.assert_allclose(row, alone[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4, "rows that differ, so that their order can be seen"


def test_a_request_of_the_most_rows_is_answered(client: triton.InferenceServerClient) -> None:
    array = np.resize(PIXELS, (64, *PIXELS.shape[1:]))
    result = client.infer("tiny", [tensor(array, "UINT8")])
    assert result.as_numpy("probabilities").shape == (64, 5)
    with pytest.raises(InferenceServerException, match="1 to 64 rows, not 65"):
        client.infer("tiny", [tensor(np.resize(PIXELS, (65, *PIXELS.shape[1:])), "UINT8")])


def test_small_files_may_hold_large_images(client: triton.InferenceServerClient) -> None:
    files = images(*(image_file("PNG", (700, 700)) for _ in range(3)))
    assert sum(map(len, files)) < 32 * 1024
    assert client.infer("tiny", [tensor(files, "BYTES")]).as_numpy("probabilities").shape == (3, 5)


# ------------------------------------------------------------------------------------------------------ classification


@both
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("count", "shown"), [(1, 1), (3, 3), (9, 5)])
async def test_classification_names_the_best_classes(
    server: Background, kind: str, binary: bool, count: int, shown: int
) -> None:
    asked = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=count)
    async with either(server, kind) as client:
        plain = (await maybe(client.infer("tiny", [tensor(PLANES)]))).as_numpy("probabilities")
        result = await maybe(client.infer("tiny", [tensor(PLANES)], outputs=[asked]))
    output = result.get_output("probabilities")
    assert (output["datatype"], output["shape"]) == ("BYTES", [ROWS, shown])
    named = result.as_numpy("probabilities")
    assert named.shape == (ROWS, shown)
    for row, texts in zip(plain, named, strict=True):
        for index, text in zip(np.argsort(-row, kind="stable"), texts, strict=False):
            value, number, label = (text if isinstance(text, str) else text.decode()).split(":")
            assert (int(number), label) == (index, CLASSES[index])
            assert float(value) == pytest.approx(row[index], abs=1e-5)
            assert len(value.split(".")[1]) == 6


# ----------------------------------------------------------------------------------------------------------- parameters


def served_by(result: triton.InferResult) -> dict[str, Any]:
    return dict(result.get_response()["parameters"])


@both
async def test_the_answer_tells_how_it_was_served(server: Background, kind: str) -> None:
    async with either(server, kind) as client:
        found = served_by(await maybe(infer_once(client)))
    assert 0 < found.pop("queue_ms") <= found.pop("latency_ms") < serving.PATIENT_MS
    assert found == {"subnet": LARGE, "accuracy": 0.9, "slo_ms": serving.PATIENT_MS, "deadline_met": True}


SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "timeout": ({"timeout": 20_000_000}, 20_000),
    "slo_ms": ({"parameters": {"slo_ms": 21_000}}, 21_000),
    "slo_ms with a fraction": ({"parameters": {"slo_ms": 21_000.5}}, 21_000.5),
    "both alike": ({"timeout": 22_000_000, "parameters": {"slo_ms": 22_000}}, 22_000),
    "query string": ({"query_params": {"slo_ms": 23_000}}, 23_000),
    "header": ({"headers": {"X-SLO-Ms": "24000"}}, 24_000),
    "body before query string": ({"query_params": {"slo_ms": 23_000}, "timeout": 20_000_000}, 20_000),
    "envoy": ({"headers": {"X-Envoy-Expected-Rq-Timeout-Ms": "25000"}}, 25_000),
    "priority": ({"priority": 1}, serving.PATIENT_MS),
    "least priority": ({"priority": 101}, serving.PATIENT_MS),
    "min_accuracy": ({"parameters": {"min_accuracy": 0.8}}, serving.PATIENT_MS),
    "min_accuracy in the query string": ({"query_params": {"min_accuracy": 0.8}}, serving.PATIENT_MS),
}


@both
@pytest.mark.parametrize("name", SETTINGS)
async def test_parameters_are_kept_to_wherever_they_stand(server: Background, kind: str, name: str) -> None:
    settings, slo_ms = SETTINGS[name]
    async with either(server, kind) as client:
        found = served_by(await maybe(client.infer("tiny", [tensor(PLANES)], **settings)))
    assert (found["slo_ms"], found["subnet"]) == (slo_ms, LARGE)


REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "another slo than timeout": ({"timeout": 50_000, "parameters": {"slo_ms": 60}}, "400", "timeout says 50.0 ms"),
    "timeout 0": ({"timeout": 0}, "400", "timeout must be between 1 and 6e"),
    "timeout too long": ({"timeout": 60_000_001}, "400", "timeout must be between"),
    "timeout too short": ({"timeout": 100}, "504", "the deadline cannot be met"),
    "slo_ms as text": ({"parameters": {"slo_ms": "soon"}}, "400", 'slo_ms must be a number, not "soon"'),
    "slo_ms as a flag": ({"parameters": {"slo_ms": True}}, "400", "slo_ms must be a number, not true"),
    "slo_ms 0": ({"parameters": {"slo_ms": 0}}, "400", "slo_ms must be above 0"),
    "priority too low": ({"priority": 102}, "400", "priority must be between 0 and 101"),
    "accuracy out of reach": ({"parameters": {"min_accuracy": 0.95}}, "400", "above the most accurate choice"),
    "unknown": ({"parameters": {"slo": 5}}, "400", "unknown 'slo' in parameters; known: slo_ms, timeout, priority"),
    "unknown in the query string": ({"query_params": {"slo": 5}}, "400", "unknown parameter 'slo'; known: members"),
    "top_k": ({"query_params": {"top_k": 5}}, "400", "ask for the classification of 'probabilities'"),
    "sequence": ({"sequence_id": 5, "sequence_start": True}, "400", "'sequence_id' in parameters: .* not supported"),
}


@both
@pytest.mark.parametrize("name", REFUSED_SETTINGS)
async def test_parameters_that_cannot_be_are_named(server: Background, kind: str, name: str) -> None:
    settings, status, message = REFUSED_SETTINGS[name]
    async with either(server, kind) as client:
        with pytest.raises(InferenceServerException) as caught:
            await maybe(client.infer("tiny", [tensor(PLANES)], **settings))
    assert Refused(status, message)(caught.value), caught.value


@pytest.mark.parametrize(
    ("given", "expected"), [({"priority": 1}, 100), ({"priority": 101}, 0), ({}, 0), ({"priority": 0}, 0)]
)
async def test_priority_1_is_the_most_urgent(profile: Path, given: dict[str, int], expected: int) -> None:
    async with faking(config_of(profile)) as running:
        first = running.infer()
        await turns_until(lambda: running.engine.batches)
        second = running.infer(parameters=given)
        await turns_until(lambda: running.counters["arrivals"] == 2)
        assert running.serve.dispatcher is not None
        assert running.serve.dispatcher.heap.head.priority == expected
        running.gate.set()
        assert [(await first).status, (await second).status] == [200, 200]


# ---------------------------------------------------------------------------------------------------------- compression


@both
@pytest.mark.parametrize("request_by", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_by", [None, "gzip", "deflate"])
async def test_requests_and_answers_may_be_compressed(
    server: Background, kind: str, request_by: str | None, response_by: str | None
) -> None:
    array = np.resize(PIXELS, (64, *PIXELS.shape[1:]))
    async with either(server, kind) as client:
        for binary in (True, False):
            result = await maybe(
                client.infer(
                    "tiny", [tensor(array, "UINT8")],
                    outputs=[triton.InferRequestedOutput("probabilities", binary_data=binary)],
                    request_compression_algorithm=request_by, response_compression_algorithm=response_by,
                )
            )  # fmt: skip
            assert result.as_numpy("probabilities").shape == (64, 5)


@dataclass
class Raw:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes
    document: Any = field(default=None)


async def ask(
    server: Background, body: bytes, headers: dict[str, str] | None = None, path: str = INFER, method: str = "POST"
) -> Raw:
    async with (
        aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=("Accept-Encoding",)) as session,
        session.request(method, server.url + path, data=body, headers=headers) as response,
    ):
        content = await response.read()
        json_only = response.content_type == "application/json" and "Content-Encoding" not in response.headers
        return Raw(response.status, dict(response.headers), content, json.loads(content) if json_only else None)


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("deflate, gzip", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("identity, gzip", None),
        ("gzip;q=0", None),
        ("gzip;q=x", None),
        ("br, zstd", None),
        ("*", None),
        ("", None),
    ],
)
async def test_a_large_answer_is_compressed_as_the_client_likes_it_best(
    server: Background, accepted: str, expected: str | None
) -> None:
    answer = await ask(server, json_body(np.resize(PIXELS, (64, SIDE, SIDE, 3))), {"Accept-Encoding": accepted})
    assert (answer.status, answer.headers.get("Content-Encoding")) == (200, expected)
    inflate: dict[str | None, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
    document = json.loads(inflate.get(expected, bytes)(answer.body))
    assert len(document["outputs"][0]["data"]) == 64 * 5


async def test_small_answers_and_errors_and_metadata_are_never_compressed(server: Background) -> None:
    accepting = {"Accept-Encoding": "gzip"}
    for method, path, body in (
        ("POST", INFER, json_body(PIXELS[:1])),
        ("POST", INFER, b"{"),
        ("GET", "/v2", b""),
        ("GET", "/v2/models/tiny/config", b""),
        ("GET", "/v2/models/stats", b""),
        ("POST", "/v2/repository/index", b""),
    ):
        answer = await ask(server, body, accepting, path, method)
        assert "Content-Encoding" not in answer.headers
        assert answer.document


async def test_the_length_of_the_header_counts_inflated_bytes(server: Background) -> None:
    data = np.resize(PIXELS, (64, SIDE, SIDE, 3)).tobytes()
    document = json.loads(with_input(shape=[64, 8, 8, 3], data=None, parameters={"binary_data_size": len(data)}))
    text = json.dumps(document | {"parameters": {"binary_data_output": True}}).encode() + b" " * 20_000
    body = gzip.compress(text + data)
    assert len(body) < len(text)
    headers = {"Content-Encoding": "gzip", "Accept-Encoding": "gzip", "Inference-Header-Content-Length": str(len(text))}
    answer = await ask(server, body, headers)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/octet-stream")
    inflated, length = gzip.decompress(answer.body), int(answer.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(inflated[:length])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(inflated) - length == 64 * 5 * 4


# ------------------------------------------------------------------------------------------------------------ bad input


def with_input(**members: Any) -> bytes:
    document = {"name": "input", "shape": [1, 8, 8, 3], "datatype": "UINT8", "data": PIXELS[0].ravel().tolist()}
    kept = {name: value for name, value in (document | members).items() if value is not None}
    return json.dumps({"inputs": [kept]}).encode()


def planes_with(value: float) -> bytes:
    return with_input(datatype="FP32", shape=[1, 3, 8, 8], data=[value] * 192)


def packed(*files: bytes) -> tuple[bytes, dict[str, str]]:
    """Encoded images as the binary data of a BYTES tensor."""
    data = b"".join(struct.pack("<I", len(each)) + each for each in files)
    sizes = {"binary_data_size": len(data)}
    text = with_input(datatype="BYTES", shape=[len(files)], parameters=sizes, data=None)
    return text + data, {"Inference-Header-Content-Length": str(len(text))}


GOOD = json_body(PIXELS[:1])
LENGTH = "Inference-Header-Content-Length"
BINARY = with_input(data=None, parameters={"binary_data_size": 192})
TWICE = with_input(parameters={"binary_data_size": 0})
BAD: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "empty": (b"", {}, 400, "the request is not JSON"),
    "no JSON": (b"{", {}, 400, "the request is not JSON"),
    "deep JSON": (b"[" * 20_000, {}, 400, "the request is not JSON"),
    "many lists": (b"[" + b"[]," * 50_000 + b"[]]", {}, 413, "50002 lists .* at most 12288 values are read"),
    "more JSON than belongs to binary data": (
        BINARY + b" " * 70_000 + bytes(192), {LENGTH: str(len(BINARY) + 70_000)}, 413, "at most 65536 are read",
    ),
    "no object": (b"[]", {}, 400, "the request must be an object, not a list"),
    "texts for numbers": (with_input(data=["1"] * 192), {}, 400, "texts are none"),
    "truths for numbers": (with_input(data=[True] * 192), {}, 400, "true, false"),
    "absurd numbers": (planes_with(1e30), {}, 400, "row 0 of 'input': .* from -1000 to 1000"),
    "shape of all kinds of things": (with_input(shape={"a": [[[]]]}), {}, 400, "shape of 'input' must be a list"),
    "too many pixels altogether": (
        *packed(*(image_file("PNG", (700, 700)) for _ in range(3))), 413,
        "row 2 of 'input': an image of 700x700 .* 1000000 pixels are decoded for one request, and 20000 are left",
    ),
    "unknown member": (b'{"input": []}', {}, 400, "unknown 'input' in the request; known: id, model_name"),
    "another model": (json_body(PIXELS[:1], model_name="x"), {}, 400, 'model_name is "x"'),
    "id that is no string": (json_body(PIXELS[:1], id=5), {}, 400, "id must be a string, not 5"),
    "no inputs": (b"{}", {}, 400, "inputs must be a list of the one input 'input', not null"),
    "two inputs": (b'{"inputs": [{}, {}]}', {}, 400, "the one input 'input', not 2 of them"),
    "input without a name": (with_input(name=None), {}, 400, "an input needs a name"),
    "another input": (with_input(name="image"), {}, 400, "unknown input 'image'; known: input"),
    "unknown datatype": (with_input(datatype="FLOAT"), {}, 400, 'unknown datatype "FLOAT" .* known: BOOL, UINT8'),
    "datatype not accepted": (with_input(datatype="INT64"), {}, 400, "cannot be INT64; accepted: UINT8, FP32, FP16, "),
    "no shape": (with_input(shape=None), {}, 400, "shape of 'input' must be a list"),
    "shape with a fraction": (with_input(shape=[1.5]), {}, 400, "shape of 'input' must be a list of whole numbers"),
    "negative shape": (with_input(shape=[-1, 8, 8, 3]), {}, 400, "whole numbers from 0 on"),
    "shape without rows": (with_input(shape=[8, 8, 3]), {}, 400, r"expected \[-1, 8, 8, 3\]"),
    "shape in another order": (with_input(shape=[1, 3, 8, 8]), {}, 400, r"UINT8 \[1, 3, 8, 8\] does not fit"),
    "no rows": (with_input(shape=[0, 8, 8, 3], data=[]), {}, 400, "1 to 64 rows, not 0"),
    "too many rows": (with_input(shape=[10**9, 8, 8, 3]), {}, 400, "1 to 64 rows, not 1000000000"),
    "data too short": (with_input(data=[1, 2]), {}, 400, r"have the shape \[2\]"),
    "no data": (with_input(data=None), {}, 400, "neither data nor binary_data_size"),
    "pixels out of range": (with_input(data=[256] * 192), {}, 400, "between 0 and 255"),
    "NaN": (planes_with(float("nan")), {}, 400, "row 0 of 'input': .* not finite"),
    "too large for float32": (planes_with(1e300), {}, 400, "row 0 of 'input': .* not finite"),
    "images in JSON": (with_input(datatype="BYTES", shape=[1], data=["x"]), {}, 400, "images are sent as binary data"),
    "not an image": (*packed(image_file("PNG"), b"hello"), 400, "row 1 of 'input': the image cannot be decoded"),
    "an image too large": (*packed(image_file("PNG", (2000, 2000))), 413, "row 0 of 'input': an image of 2000x2000"),
    "shared memory": (with_input(parameters={"shared_memory_region": "a"}), {}, 400, "shared memory are not"),
    "unknown parameter of the input": (with_input(parameters={"x": 1}), {}, 400, "unknown 'x' in parameters of"),
    "triton's own parameter": (json_body(PIXELS[:1], parameters={"triton_x": 1}), {}, 400, "'triton_x' in parameters"),
    "parameters that are no object": (json_body(PIXELS[:1], parameters=[]), {}, 400, "parameters must be an object"),
    "flag that is none": (
        json_body(PIXELS[:1], parameters={"binary_data_output": 1}), {}, 400, "binary_data_output must be true or f",
    ),
    "outputs that are no list": (json_body(PIXELS[:1], outputs={}), {}, 400, "outputs must be a list"),
    "unknown output": (json_body(PIXELS[:1], outputs=[{"name": "x"}]), {}, 400, 'unknown output "x"; known: probab'),
    "output twice": (json_body(PIXELS[:1], outputs=[{"name": "probabilities"}] * 2), {}, 400, "asked for 2 times"),
    "classification 0": (
        json_body(PIXELS[:1], outputs=[{"name": "probabilities", "parameters": {"classification": 0}}]),
        {}, 400, "classification must be between 1 and",
    ),
    "header length no number": (GOOD, {LENGTH: "x"}, 400, "must be between 0 and the .* not 'x'"),
    "header length empty": (GOOD, {LENGTH: ""}, 400, "must be between 0 and the"),
    "header length beyond the body": (GOOD, {LENGTH: str(len(GOOD) + 1)}, 400, "must be between 0 and the"),
    "header length negative": (GOOD, {LENGTH: "-1"}, 400, "must be between 0 and the"),
    "header length too short": (GOOD, {LENGTH: "5"}, 400, "the request is not JSON"),
    "bytes nobody wants": (GOOD + b"xx", {LENGTH: str(len(GOOD))}, 400, "2 bytes of binary data, but no input"),
    "binary data missing": (BINARY, {LENGTH: str(len(BINARY))}, 400, "binary_data_size of 'input' is 192; 0 bytes"),
    "binary data too long": (BINARY + bytes(193), {LENGTH: str(len(BINARY))}, 400, "is 192; 193 bytes were sent"),
    "binary without a header": (BINARY + bytes(192), {}, 400, "the request is not JSON"),
    "data and binary data": (TWICE, {LENGTH: str(len(TWICE))}, 400, "both data and binary_data_size"),
    "raw of another size": (bytes(100), {LENGTH: "0"}, 400, "100 bytes are neither an image nor a raw tensor"),
    "unknown encoding": (GOOD, {"Content-Encoding": "br"}, 501, "'br' is not read here; known: gzip, deflate"),
    "damaged gzip": (b"garbage", {"Content-Encoding": "gzip"}, 400, "the body cannot be read: .*gzip"),
    "cut gzip": (gzip.compress(GOOD)[:-30], {"Content-Encoding": "gzip"}, 400, "the request is not JSON"),
    "too large": (bytes(BODY_LIMIT + 1), {}, 413, "larger than this server accepts"),
    "too large once inflated": (gzip.compress(bytes(BODY_LIMIT + 1)), {"Content-Encoding": "gzip"}, 413, "larger than"),
}  # fmt: skip


@pytest.fixture(scope="module")
def strict(profile: Path) -> Iterator[Background]:
    with in_background(config_of(profile, max_body_bytes=BODY_LIMIT, max_pixels=1_000_000)) as running:
        yield running


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests_are_named_and_harm_nobody(strict: Background, name: str) -> None:
    body, headers, status, named = BAD[name]
    answer = await ask(strict, body, headers)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
    assert re.search(named, answer.document["error"]), answer.document["error"]
    assert answer.document["reason"]
    assert (await ask(strict, GOOD)).status == 200


async def test_large_answers_are_encoded_aside(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.infer_answers.INLINE_VALUES", 10)
    async with faking(config_of(profile)) as running:
        running.gate.set()
        before = {thread.ident for thread in threading.enumerate() if thread.name == "aside"}
        small = await (await running.infer(2)).json()
        assert {thread.ident for thread in threading.enumerate() if thread.name == "aside"} == before
        large = await (await running.infer(3)).json()
        assert {thread.ident for thread in threading.enumerate() if thread.name == "aside"} != before
    assert small["outputs"][0]["data"] * 3 == large["outputs"][0]["data"] * 2


async def test_an_encoding_that_is_not_read_is_told_those_that_are(server: Background) -> None:
    answer = await ask(server, GOOD, {"Content-Encoding": "br"})
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"


RAW_BODIES = {
    "pixels": PIXELS[0].tobytes(),
    "planes": PLANES[0].tobytes(),
    "image": image_file("PNG"),
}


@pytest.mark.parametrize("name", RAW_BODIES)
async def test_a_raw_request_is_one_input_and_is_answered_in_binary(server: Background, name: str) -> None:
    answer = await ask(server, RAW_BODIES[name], {LENGTH: "0", "X-SLO-Ms": "20000"})
    assert answer.status == 200
    length = int(answer.headers[LENGTH])
    document = json.loads(answer.body[:length])
    assert document["outputs"][0]["shape"] == [1, 5]
    assert document["parameters"]["slo_ms"] == 20_000
    assert np.frombuffer(answer.body[length:], "<f4").sum() == pytest.approx(1, abs=1e-5)


async def test_json_may_come_nested_and_with_the_model_it_was_sent_to(server: Background) -> None:
    body = {
        "model_name": "tiny",
        "model_version": "1",
        "inputs": [{"name": "input", "shape": [5, 8, 8, 3], "datatype": "UINT8", "data": PIXELS.tolist()}],
        "outputs": [],
    }
    answer = await ask(server, json.dumps(body).encode())
    assert (answer.status, answer.document["outputs"][0]["shape"]) == (200, [5, 5])
    assert "id" not in answer.document


ELSEWHERE = {
    "unknown route": ("GET", "/v2/nothing", b"", 404, "no route /v2/nothing"),
    "wrong method": ("GET", INFER, b"", 405, "GET is not allowed"),
    "index no JSON": ("POST", "/v2/repository/index", b"{", 400, "the body is not JSON"),
    "index unknown": ("POST", "/v2/repository/index", b'{"x": 1}', 400, "no member but 'ready'"),
    "index too large": ("POST", "/v2/repository/index", b" " * 70_000, 413, "at most 65536 are read"),
    "index no flag": ("POST", "/v2/repository/index", b'{"ready": 1}', 400, "ready must be true or false"),
    "load unknown": ("POST", "/v2/repository/models/tiny/load", b"[]", 400, "no member but 'parameters'"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
async def test_errors_of_other_routes_have_the_same_form(server: Background, name: str) -> None:
    method, path, body, status, named = ELSEWHERE[name]
    answer = await ask(server, body, {}, path, method)
    assert answer.status == status
    assert re.search(named, answer.document["error"])


# ---------------------------------------------------------------------------------------------------------- scheduling


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str]:
    return response.status, (await response.json())["reason"]


async def test_the_rows_of_a_request_are_queries_that_share_a_deadline(profile: Path) -> None:
    async with faking(config_of(profile)) as running:
        task = running.infer(5, parameters={"slo_ms": 20_000})
        await turns_until(lambda: running.engine.batches)
        assert running.engine.batches == [(LARGE, 5)]
        running.gate.set()
        document = await (await task).json()
        assert document["outputs"][0]["shape"] == [5, 5]
        assert running.counters == {"arrivals": 5, "in_time": 5}


async def test_rows_that_run_on_several_subnets_are_told_together(profile: Path) -> None:
    async with faking(config_of(profile)) as running:
        running.gate.set()
        assert running.serve.dispatcher is not None
        entries = running.serve.dispatcher.table.entries
        served = []

        class Alternating:
            """A policy that takes one query at a time, on each subnet in turn."""

            def __init__(self, policy: Any) -> None:
                self.arrived, self.adopt, self._decide = policy.arrived, policy.adopt, policy.decide

            def decide(self, now_s: float, queue: Any, lowest: int) -> Any:
                served.append(entries[len(served) % 2])
                return self._decide(now_s, queue, lowest)._replace(entry=served[-1], batch_size=1)

        running.serve.dispatcher.policy = Alternating(running.serve.dispatcher.policy)  # type: ignore[assignment]
        document = await (await running.infer(3)).json()
    found = document["parameters"]
    assert found["subnet"] == f"{SMALL},{LARGE}"
    assert found["accuracy"] == pytest.approx((0.7 + 0.9 + 0.7) / 3, abs=1e-4)
    assert found["deadline_met"] is True


async def test_rows_that_find_no_place_take_the_whole_request_back(profile: Path) -> None:
    async with faking(config_of(profile, max_queue=3)) as running:
        running_one = running.infer()
        await turns_until(lambda: running.engine.batches)
        waiting = running.infer()
        await turns_until(lambda: running.counters["arrivals"] == 2)
        response = await running.infer(3)
        assert await error_of(response) == (429, "queue_full")
        assert response.headers["Retry-After"] == "1"
        assert running.serve.dispatcher is not None
        assert len(running.serve.dispatcher.heap) == 1
        assert running.counters["queue_full"] + running.counters["cancelled"] == 3
        running.gate.set()
        assert [(await running_one).status, (await waiting).status] == [200, 200]


async def test_a_request_may_have_no_more_rows_than_the_queue_has_places(profile: Path) -> None:
    async with faking(config_of(profile, max_queue=3)) as running:
        config = await (await running.client.get("/v2/models/tiny/config")).json()
        assert config["max_batch_size"] == 3
        response = await running.infer(4)
        assert response.status == 400
        assert "1 to 3 rows, not 4" in (await response.json())["error"]


async def test_rows_expire_together(profile: Path) -> None:
    async with faking(config_of(profile)) as running:
        beside = running.infer()
        await turns_until(lambda: running.engine.batches)
        response = await running.infer(4, parameters={"timeout": 60_000})
        document = await response.json()
        assert (response.status, document["reason"], document["slo_ms"]) == (504, "deadline", 60)
        running.gate.set()
        assert (await beside).status == 200
        assert running.counters == {"arrivals": 5, "expired": 4, "in_time": 1}


async def test_a_row_that_fails_fails_its_request(profile: Path) -> None:
    async with faking(config_of(profile)) as running:
        running.gate.set()
        rows = serving.outputs_for(3).probabilities.copy()
        rows[1] = np.nan
        running.engine.rows = rows
        assert await error_of(await running.infer(3)) == (500, "engine_failed")
        running.engine.rows = None
        assert (await running.infer(3)).status == 200


async def test_a_client_that_goes_away_takes_all_its_rows_along(profile: Path) -> None:
    async with faking(config_of(profile)) as running:
        beside = running.infer()
        await turns_until(lambda: running.engine.batches)
        body = json_body(PIXELS)
        _, writer = await asyncio.open_connection(running.client.host, running.client.port)
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        dispatcher = running.serve.dispatcher
        assert dispatcher is not None
        await turns_until(lambda: len(dispatcher.heap) == 5)
        writer.close()
        await writer.wait_closed()
        await turns_until(lambda: not dispatcher.heap)
        running.gate.set()
        assert (await beside).status == 200
        assert running.counters == {"arrivals": 6, "cancelled": 5, "in_time": 1}


async def test_an_upload_that_outlasts_the_slo_of_its_head_gets_504(profile: Path) -> None:
    async with faking(config_of(profile)) as running:
        reader, writer = await asyncio.open_connection(running.client.host, running.client.port)
        writer.write(f"POST {INFER}?slo_ms=30 HTTP/1.1\r\nHost: x\r\nContent-Length: 192\r\n\r\n{{".encode())
        status = await reader.readline()
        writer.close()
    assert status.split()[1] == b"504"


async def test_before_it_is_ready_a_server_says_so_everywhere(profile: Path) -> None:
    app, gate = make_app(config_of(profile)), asyncio.Event()
    engine = fake_engine(app[SERVE])

    async def warm_up(*_: object) -> None:
        await gate.wait()

    engine.warm_up = warm_up  # type: ignore[method-assign]
    async with TestClient(TestServer(app)) as client:
        asks: list[Awaitable[aiohttp.ClientResponse]] = [
            client.get("/v2/health/ready"),
            client.get("/v2/models/tiny/ready"),
            client.post(INFER, data=GOOD),
            client.post("/v2/repository/models/tiny/load"),
        ]
        for response in await asyncio.gather(*asks):
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert await response.json() == {"error": "starting", "reason": "not_ready"}
        for path in ("/v2", "/v2/health/live", "/v2/models/tiny", "/v2/models/tiny/config", "/v2/models/stats"):
            assert (await client.get(path)).status == 200
        index = await (await client.post("/v2/repository/index")).json()
        assert index == [{"name": "tiny", "version": "1", "state": "UNAVAILABLE", "reason": "starting"}]
        assert await (await client.post("/v2/repository/index", json={"ready": True})).json() == []
        gate.set()
        await app[SERVE].start_soon()
        assert (await client.get("/v2/models/tiny/versions/1/ready")).status == 200


async def test_rows_that_are_decoded_too_late_are_counted_as_refused(profile: Path) -> None:
    async with faking(config_of(profile)) as running:
        release = threading.Event()
        busy = [asyncio.create_task(running.serve.aside(release.wait)) for _ in range(ASIDE)]
        body, headers = packed(*[image_file("PNG", (600, 500))] * 3)
        late = asyncio.create_task(running.client.post(f"{INFER}?slo_ms=50", data=body, headers=headers))
        arrived_s = running.serve.clock()
        await turns_until(lambda: running.serve.clock() > arrived_s + 0.2)
        release.set()
        assert await error_of(await late) == (504, "deadline")
        assert running.counters == {"arrivals": 1, "infeasible": 1}
        await asyncio.gather(*busy)


async def test_statistics_count_what_was_served(profile: Path) -> None:
    began_ms = time.time() * 1e3
    async with faking(config_of(profile)) as running:
        running.gate.set()
        for rows in (3, 3, 1):
            assert (await running.infer(rows)).status == 200
        assert (await running.infer(1, parameters={"timeout": 100})).status == 504
        (stats,) = (await (await running.client.get("/v2/models/tiny/stats")).json())["model_stats"]
    assert (stats["version"], stats["inference_count"], stats["execution_count"]) == ("1", 7, 3)
    assert began_ms - 1 <= stats["last_inference"] <= time.time() * 1e3
    times = stats["inference_stats"]
    assert {name: each["count"] for name, each in times.items()} == {
        "success": 7, "fail": 1, "queue": 7, "compute_input": 7, "compute_infer": 7, "compute_output": 7,
        "cache_hit": 0, "cache_miss": 0,
    }  # fmt: skip
    parts_ns = sum(times[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert parts_ns == pytest.approx(times["success"]["ns"], abs=10)
    assert [(each["batch_size"], each["compute_infer"]["count"]) for each in stats["batch_stats"]] == [(1, 1), (3, 2)]


def test_tritonclients_own_bytes_are_what_is_packed_here() -> None:
    assert packed(b"one", b"two")[0].endswith(serialize_byte_tensor(images(b"one", b"two")).item())
