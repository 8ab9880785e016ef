"""The soak of scripts/soak.py: its checks, and a short run against a tiny servable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import serving

from scripts import soak

ROOT = Path(__file__).parent.parent


def good() -> dict[str, Any]:
    """What a run finds where nothing is wrong."""
    return {
        "unanswered": 0, "unexpected": {}, "rss_growth_percent": -0.1, "fd_growth": 0, "thread_growth": 0,
        "server": {"arrivals": 10, "in_time": 6, "cancelled": 4}, "error_log_lines": 0, "exit_code": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("what", "value", "failed"),
    [
        ("unanswered", 1, "every query is answered"),
        ("unexpected", {"image 500": 1}, "answers are as expected"),
        ("server", {"arrivals": 10, "in_time": 9}, "outcomes sum to arrivals"),
        ("server", {"arrivals": 0}, "outcomes sum to arrivals"),
        ("rss_growth_percent", 2.0, "memory is flat"),
        ("fd_growth", 1, "file descriptors are flat"),
        ("thread_growth", 1, "threads are flat"),
        ("error_log_lines", 1, "no error in the log"),
        ("exit_code", 75, "the server drains"),
    ],
)
def test_each_check_finds_what_it_is_there_for(what: str, value: object, failed: str) -> None:
    assert soak.failed_checks(good()) == []
    assert soak.failed_checks({**good(), what: value}) == [failed]


def test_the_time_is_longer_than_the_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.parse_arguments(["--seconds", "60"]).warm_up_s == 12
    assert soak.parse_arguments(["--minutes", "30"]).warm_up_s == 60
    with pytest.raises(SystemExit):
        soak.parse_arguments(["--seconds", "10", "--warm-up-s", "10"])
    assert "longer than the warm-up" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_stands_a_short_soak(tmp_path: Path) -> None:
    """Thirty seconds and not sixty, as all tests of the suite wait for it; the tiny servable is soaked."""
    profile = serving.write_servable(tmp_path / "tiny")
    command = [sys.executable, "scripts/soak.py", "--seconds", "30", "--rate", "40", "--profile", str(profile)]
    command += ["--flags", "--threads", "1", "--device", "cpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    document = json.loads(ended.stdout.splitlines()[-1])
    assert (document["failed"], ended.returncode) == ([], 0), {**document, "stderr": ended.stderr[-2000:]}
    assert document["sent"] == document["answered"] + document["cancelled"] > 500
    asked = {name.rsplit(" ", 1)[0] for name in document["outcomes"]}
    assert asked == {kind.ask.__name__ for kind in soak.KINDS}
