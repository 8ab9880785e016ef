"""The replay sends on schedule whatever comes back, and counts every query once, as what became of it.

The server here is a small real one in a thread. What it does with a query stands in the query's body, the "image".
"""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from aiohttp import web

from scripts import replay

REPLY = {
    "predictions": [{"label": "cat", "index": 3, "probability": 0.97}],
    "subnet": "d2-2-1-e0.5", "accuracy": 0.9, "batch_size": 4,
    "slo_ms": 100.0, "latency_ms": 12.5, "queue_ms": 4.1, "deadline_met": True,
}  # fmt: skip
ERRORS = {b"full": (429, "full"), b"late": (504, "deadline_passed"), b"draining": (503, "draining")}


class Server:
    """Answers by the body; ``gather`` holds all answers back until so many queries are there."""

    def __init__(self) -> None:
        self.ready_status = 200
        self.gather = 1
        self.heads: list[web.Request] = []
        self.url = ""
        self._all_there = asyncio.Event()

    async def ready(self, request: web.Request) -> web.Response:
        return web.json_response({"reason": "warming_up"}, status=self.ready_status)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.heads.append(request)
        if len(self.heads) >= self.gather:
            self._all_there.set()
        await self._all_there.wait()
        if body in ERRORS:
            status, reason = ERRORS[body]
            return web.json_response({"error": "no", "reason": reason}, status=status)
        if body == b"hang up" and request.transport:
            request.transport.abort()
        if body == b"interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if body == b"garbage":
            return web.Response(text="not JSON")
        if body == b"close":
            return web.json_response(REPLY, headers={"Connection": "close"})
        if body == b"chunked":
            return await self._chunked(request)
        return web.json_response(REPLY)

    async def _chunked(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        text = json.dumps(REPLY).encode()
        await response.write(text[:20])
        await response.write(text[20:])
        return response

    async def run(self, started: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application()
        app.add_routes([web.get("/vision/readyz", self.ready), web.post("/vision/predict", self.predict)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/vision"
        started.set()
        await stop.wait()
        await runner.cleanup()


@pytest.fixture
def server() -> Iterator[Server]:
    server, loop = Server(), asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.run(started, stop),))
    thread.start()
    assert started.wait(5), "the test's server did not start"
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def run(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Replay these bodies (in some order), 1 ms apart, and return the report of the last line."""

    def run(bodies: list[str], *options: str, classes: str = "cat", exits: bool = False) -> dict[str, Any]:
        for index, body in enumerate(bodies):
            folder = tmp_path / "images" / classes.split()[index % len(classes.split())]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:03}.jpg").write_bytes(body.encode())
        trace = tmp_path / "trace.txt"
        trace.write_text("".join(f"{index / 1000}\n" for index in range(len(bodies))))
        arguments = ["--url", server.url, "--trace", str(trace), "--images", str(tmp_path / "images"), *options]
        if exits:
            with pytest.raises(SystemExit) as raised:
                replay.main(arguments)
            assert raised.value.code == 130
        else:
            replay.main(arguments)
        report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert sum(report["outcomes"].values()) == report["queries"]
        return report

    return run


def test_every_query_is_counted_once_by_what_became_of_it(run: Any) -> None:
    others = ["full", "full", "late", "late", "draining", "hang up", "garbage", "close", "chunked"]
    report = run(["ok"] * 5 + others, "--slo-ms", "2000")
    assert report["outcomes"] == {
        "200 in time": 7, "429 full": 2, "504 deadline_passed": 2, "503 draining": 1, "connection": 1,
        "200 unreadable": 1,
    }  # fmt: skip
    assert report["queries"] == 14
    assert report["attainment"] == report["attainment_server"] == 0.5
    assert report["batch_sizes"] == {"4": 7}
    assert report["subnets"]["d2-2-1-e0.5"]["queries"] == 7
    assert report["complete"] is True


def test_answers_after_the_clients_deadline_do_not_count_whatever_the_server_says(run: Any) -> None:
    report = run(["ok"] * 4, "--slo-ms", "0.001")
    assert report["outcomes"] == {"200 late": 4}
    assert (report["attainment"], report["attainment_server"]) == (0, 1)
    assert report["mean_serving_accuracy"] is None
    assert report["latency_ms"]["p50"] > 0


def test_sending_does_not_wait_for_answers(run: Any, server: Server) -> None:
    # No query is answered before all are there: a closed loop, or a full pool, would wait for ever.
    server.gather = 30
    report = run(["ok"] * 30, "--slo-ms", "5000", "--connections", "2")
    assert report["outcomes"] == {"200 in time": 30}
    assert report["latency_ms"]["p99.9"] > 25, "the first query waited for the last, 29 ms later"


def test_connections_are_used_again(run: Any, server: Server) -> None:
    run(["ok"] * 30, "--slo-ms", "5000", "--connections", "3")
    peers = {request.transport.get_extra_info("peername") for request in server.heads if request.transport}
    assert len(peers) < 15


def test_accuracy_is_observed_by_label_and_compared_with_the_profile(run: Any) -> None:
    report = run(["ok"] * 20, "--slo-ms", "5000", classes="cat cat2 cat cat3")
    assert report["mean_serving_accuracy"] == 0.9
    assert report["observed_accuracy"] == 0.5
    assert report["observed_accuracy_error"] == pytest.approx((0.25 / 20) ** 0.5, abs=1e-6)
    assert report["profiled_minus_observed"] == pytest.approx(0.4)
    assert report["server_latency_ms"] == {"p50": 12.5, "p99": 12.5}


def test_each_query_asks_for_its_slo_and_floor_with_the_image_as_it_is(run: Any, server: Server) -> None:
    run(["ok"], "--slo-ms", "2000", "--min-accuracy", "0.8")
    (request,) = server.heads
    assert request.query_string == "slo_ms=2000.0&min_accuracy=0.8"
    assert request.content_type == "image/jpeg"


def test_the_report_says_how_it_came_about(run: Any) -> None:
    report = run(["ok"] * 10, "--rate", "500", "--start", "0.004", "--seed", "3", "--label", "mine")
    assert report["seed"] == 3
    assert report["arguments"]["label"] == "mine"
    assert set(report["versions"]) == {"python", "numpy", "uvloop", "httptools"}
    assert report["machine"]["cpus"] >= 1
    assert "commit" in report
    workload = report["workload"]
    assert (workload["before"]["count"], workload["sent"]["count"]) == (10, 8)
    assert workload["squeezed_by"] == pytest.approx(0.45), "10 arrivals in 9 ms are 1,111/s"
    assert report["send_delay_ms"]["p99"] >= 0


def test_the_timeline_stands_at_the_scheduled_arrivals(server: Server) -> None:
    client = replay.Client(urlsplit(server.url), [], [0.0, 0.5, 0.9, 2.5])
    client.sent, client.start_s = 4, 100.0
    client.sent_s, client.done_s = [100.0] * 4, [100.01, 102.5, 101.0, 102.51]
    client.status = [200, 200, 429, 200]
    better = {**REPLY, "accuracy": 0.95, "batch_size": 1}
    client.body = [json.dumps(reply).encode() for reply in (REPLY, REPLY, {"reason": "full"}, better)]
    results = replay.collect(client, np.arange(4), ["cat"] * 4, slo_s=0.1)
    assert replay.timeline(results, 1.0) == {
        "bin_s": 1.0,
        "time_s": [0.0, 1.0, 2.0],
        "arrivals": [3, 0, 1],
        "attainment": [0.33333, None, 1.0],
        "accuracy": [0.9, None, 0.95],
        "batch_size": [4.0, None, 1.0],
        "p99_ms": [pytest.approx(1980.1), None, 10.0],
    }


async def test_a_query_that_is_never_answered_is_an_outcome(server: Server) -> None:
    server.gather = 2
    url = urlsplit(server.url)
    head = replay.request_head(url, {"slo_ms": 5}, "image/jpeg", 2)
    client = replay.Client(url, [head + b"ok"], [0.0])
    assert await client.run(connections=1, grace_s=0.05)
    assert (client.status, client.body) == ([0], [b"unanswered"])
    assert not client.connections or all(connection.transport.is_closing() for connection in client.connections)


def test_ctrl_c_reports_what_was_done_so_far(run: Any) -> None:
    report = run(["interrupt"] * 10, "--rate", "2", "--slo-ms", "5000", exits=True)
    assert report["complete"] is False
    assert report["outcomes"] == {"200 in time": 1}


@pytest.mark.slow  # imports matplotlib
def test_files_hold_the_report_and_the_picture_of_one_or_several_runs(run: Any, tmp_path: Path) -> None:
    file, picture, both = tmp_path / "run.json", tmp_path / "run.png", tmp_path / "both.png"
    report = run(["ok"] * 4 + ["full"], "--json", str(file), "--plot", str(picture))
    written = json.loads(file.read_text())
    assert written.pop("timeline_fine")["bin_s"] == 0.25
    assert written == report
    from scripts import plot_replay

    plot_replay.main([str(file), str(file), "--out", str(both)])
    assert picture.read_bytes()[:4] == both.read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------------------------ bad input


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a replay that cannot start."""
    with pytest.raises(SystemExit) as raised:
        replay.main(arguments)
    assert raised.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return lines[-1]


@pytest.fixture
def images(tmp_path: Path) -> str:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"ok")
    return str(tmp_path)


def test_a_server_that_is_not_there_is_one_line(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert f"no server at {url}" in failure(capsys, "--poisson", "9", "--images", images, "--url", url)


def test_a_server_not_ready_is_one_line(server: Server, images: str, capsys: pytest.CaptureFixture[str]) -> None:
    server.ready_status = 503
    message = failure(capsys, "--poisson", "9", "--images", images, "--url", server.url)
    assert "is not ready: GET /readyz answers 503" in message
    assert "warming_up" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--poisson", "9", "--url", "127.0.0.1:8000"], "--url: expected something like http://127.0.0.1:8000"),
        (["--poisson", "9", "--url", "http://127.0.0.1:x"], "--url: expected something like http://127.0.0.1:8000"),
        (["--poisson", "9", "--images", "/nowhere"], "/nowhere: no images; expected /nowhere/CLASS/*.jpg"),
        (["--poisson", "9", "--data", "/nowhere.npz"], "/nowhere.npz: no archive of test images"),
        (["--poisson", "0"], "rate must be above zero"),
        (["--trace", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
        (["--poisson", "9", "--rate", "-1"], "rate must be above zero, not -1"),
        (["--poisson", "9", "--thin", "2"], "fraction must be above 0 and at most 1, not 2"),
        (["--poisson", "9", "--duration", "-1"], "--duration: must be above zero, not -1"),
        (["--poisson", "9", "--slo-ms", "nan"], "--slo-ms: must be above zero, not nan"),
        (["--poisson", "9", "--start", "-1"], "--start: must be zero or more, not -1"),
        (["--poisson", "9", "--min-accuracy", "90"], "--min-accuracy: must be from 0 to 1, not 90"),
        ([], "one of the arguments --trace --poisson is required"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failure(capsys, *options)


def test_a_cut_without_arrivals_says_what_there_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("0\n1\n")
    message = failure(capsys, "--trace", str(tmp_path / "t.txt"), "--start", "5")
    assert "no arrivals left: of 2, up to 1 s, the cut takes none" in message


def test_files_that_are_no_images_are_named(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(images) / "cat" / "notes.txt").write_text("x")
    message = failure(capsys, "--poisson", "9", "--images", images)
    assert "notes.txt: not named like an image" in message


@pytest.mark.slow  # imports matplotlib
def test_a_plot_needs_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    from scripts import plot_replay

    with pytest.raises(SystemExit, match="2"):
        plot_replay.main([str(tmp_path / "other.json"), "--out", str(tmp_path / "x.png")])
    assert "other.json: no report of replay.py" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- samples


def test_archive_images_are_sent_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(
        path,
        test_jpeg=np.frombuffer(b"aabbb", np.uint8),
        test_offsets=[0, 2, 5],
        test_labels=np.array([1, 0], np.uint8),
        classes=["cat", "dog"],
    )
    samples = replay.load_samples(str(path), None)
    assert samples == replay.Samples([b"aa", b"bbb"], ["image/jpeg"] * 2, ["dog", "cat"])


@pytest.mark.slow  # imports scikit-learn
def test_digits_are_sent_as_png() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn holds the digits")
    samples = replay.load_samples("digits", None)
    assert len(samples.bodies) == len(samples.labels) == 360
    assert samples.bodies[0].startswith(b"\x89PNG")
    assert set(samples.labels) == set("0123456789")


def test_an_image_sent_often_is_one_sample_for_the_sampling_error() -> None:
    right = np.array([1.0, 1, 0, 0])
    assert replay._sampling_error(right, np.array([0, 1, 2, 3])) == 0.25
    assert replay._sampling_error(right, np.array([0, 0, 1, 1])) == pytest.approx(0.353553)
