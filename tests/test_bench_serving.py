"""The server's benchmark keeps what it has measured so far; the server and the replay are fakes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_serving

TRACE = "\n".join(str(second / 100) for second in range(1000))


class FakeRunning:
    url, ready_s = "http://127.0.0.1:1", 0.5

    def resident_mb(self) -> float:
        return 100.0


@contextlib.contextmanager
def fake_server(profile: Path, policy: str, flags: Sequence[str]) -> Iterator[FakeRunning]:
    yield FakeRunning()


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that measures two policies, where there is no git."""
    (tmp_path / "trace.txt").write_text(TRACE)
    monkeypatch.setattr(bench_serving, "server", fake_server)
    monkeypatch.setenv("PATH", str(tmp_path))
    return [
        "--data", "digits", "--trace", str(tmp_path / "trace.txt"), "--capacity", "50", "--loads", "0.5", "--duration",
        "2", "--policies", "first", "second", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def test_it_ends_with_its_document_which_names_no_commit_where_there_is_no_git(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_serving, "replay", lambda url, arguments, report: {"attainment": 0.75})
    bench_serving.main(arguments)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "serving.json").read_text())
    assert document["commit"] is None
    assert [(row["policy"], row["attainment"]) for row in document["rows"]] == [("first", 0.75), ("second", 0.75)]


def test_runs_before_one_that_fails_are_kept(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_second(url: str, arguments: Sequence[str], report: Path) -> dict[str, Any]:
        if "second" in report.name:
            raise RuntimeError("cut off")
        return {"attainment": 0.75}

    monkeypatch.setattr(bench_serving, "replay", fail_second)
    with pytest.raises(RuntimeError, match="cut off"):
        bench_serving.main(arguments)
    document = json.loads((tmp_path / "out" / "serving.json").read_text())
    assert [row["policy"] for row in document["rows"]] == ["first"]
