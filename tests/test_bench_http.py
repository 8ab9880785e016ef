"""The benchmark of HTTP counts what it says: replies and failures, in frames however they are cut, by a real server."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving

from scripts import bench_http
from scripts.bench_http import Slice, StreamFlood

ANSWER = b'{"id": 0, "subnet": "d1-1-1-e1", "deadline_met": true}'
LONG_ANSWER = ANSWER[:-1] + b', "more": "' + b"x" * 200 + b'"}'
OPEN = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
FRAMES = [b"first", b"second", b"third"]


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


def frame(text: bytes, first: int = 0x81) -> bytes:
    head = struct.pack(">BB", first, len(text)) if len(text) < 126 else struct.pack(">BBH", first, 126, len(text))
    return head + text


def connected() -> tuple[StreamFlood, Wire]:
    client, wire = StreamFlood(b"hello", FRAMES, in_flight=2), Wire()
    client.connection_made(wire)  # type: ignore[arg-type]
    return client, wire


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_each_reply_is_counted_and_followed_by_a_query_however_the_bytes_are_cut(size: int) -> None:
    client, wire = connected()
    data = OPEN + frame(ANSWER) + frame(b"ping", 0x89) + frame(LONG_ANSWER) + frame(ANSWER)
    for start in range(0, len(data), size):
        client.data_received(data[start : start + size])
    assert (client.replies, client.failure) == (3, None)
    assert b"".join(wire.written) == b"hello" + b"firstsecond" + b"thirdfirstsecond"


def test_an_error_reply_is_a_failure() -> None:
    client, _ = connected()
    client.data_received(OPEN + frame(ANSWER) + frame(b'{"error": "no", "status": 429}'))
    assert client.failure == '{"error": "no", "status": 429}'


def test_a_refused_handshake_is_a_failure_and_nothing_is_sent() -> None:
    client, wire = connected()
    client.data_received(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
    assert client.failure == "HTTP/1.1 503 Service Unavailable"
    assert wire.written == [b"hello"]


@pytest.mark.parametrize("pixels", [4, 1000, 70_000])
def test_frames_hold_the_query_under_a_mask(pixels: int) -> None:
    payload = np.random.default_rng(0).bytes(pixels)
    for number, data in enumerate(bench_http.stream_frames((1, 1, pixels), payload, 3, seed=0)):
        head = {4: 2, 1000: 4, 70_000: 10}[pixels]
        mask, masked = data[head : head + 4], data[head + 4 :]
        message = bytes(byte ^ mask[place % 4] for place, byte in enumerate(masked))
        length = struct.unpack_from("<I", message)[0]
        assert json.loads(message[4 : 4 + length]) == {"id": number, "dtype": "uint8", "shape": [1, 1, pixels]}
        assert message[4 + length :] == payload
        assert data[0] == 0x82
        assert data[1] & 0x80


def test_ratios_are_taken_within_a_round() -> None:
    slices = {name: [Slice(100, 10), Slice(10, 100)] for name in ("bare", "predict JPEG", "v2", "stream")}
    found = bench_http.ratios(slices | {"predict": [Slice(50, 20), Slice(5, 200)]})
    assert found["predict of bare"] == {"per_s": 0.5, "cpu": 2.0}
    assert found["stream of predict"] == {"per_s": 2.0, "cpu": 0.5}


@pytest.mark.parametrize("option", ["--seconds", "--rounds", "--connections", "--in-flight"])
def test_numbers_must_be_above_zero(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_http.parse_arguments([option, "0"])
    assert f"argument {option}: must be above zero" in capsys.readouterr().err


@pytest.mark.slow
def test_all_rows_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_http, "two_cores", lambda: (None, None))  # the tests that follow need all of them
    profile, file = serving.write_servable(tmp_path), tmp_path / "report.json"
    bench_http.main([
        "--profile", str(profile), "--client", "own", "--seconds", "0.1", "--rounds", "1", "--connections", "4",
        "--in-flight", "8", "--json", str(file),
    ])  # fmt: skip
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(file.read_text())
    assert set(report["rows"]) == {"bare", "predict", "predict JPEG", "v2", "stream"}
    assert all(row["per_s"] > 0 and row["cpu_us"] > 0 for row in report["rows"].values())
    assert report["input"] == [serving.SIDE, serving.SIDE, 3]
    assert 0 < report["half_load"]["p50_ms"] <= report["half_load"]["p99_ms"]
    assert len(report["bars"]) == 3
