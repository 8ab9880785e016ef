"""scripts/bench_overload.py: what its figures are made of, and a short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import bench_overload
from scripts.bench_overload import BROKEN, UNANSWERED, UNSENT, Load, Phase, Seen, Sent

ROOT = Path(__file__).parent.parent
SLO_S = 0.1


def sent(*rows: tuple[float, float, int], delay_s: float = 0.0) -> Sent:
    """Queries by scheduled instant, latency and status."""
    scheduled_s = np.array([row[0] for row in rows])
    return Sent(
        start_s=50.0, scheduled_s=scheduled_s, sent_s=scheduled_s + delay_s,
        done_s=scheduled_s + [row[1] for row in rows], status=np.array([row[2] for row in rows]),
        cpu_s=np.array([[0.0, 1.0], [10.0, 6.0]]),
    )  # fmt: skip


def test_goodput_counts_answers_within_the_slo_and_nothing_else() -> None:
    nan = float("nan")
    found = sent(
        (0.0, 0.1, 200), (0.1, 0.05, 200), (0.2, 0.2, 200), (0.3, 0.01, 504), (1.4, nan, UNSENT),
        (1.5, nan, UNANSWERED), (1.6, nan, BROKEN), (1.7, 0.01, 200), delay_s=0.002,
    )  # fmt: skip
    figures = found.figures(2.0, SLO_S)
    assert (figures["goodput"], figures["attainment"], figures["offered_rate"]) == (1.5, 0.375, 4.0)
    assert figures["goodput_by_second"] == {"least": 1, "median": 1.5}
    assert figures["outcomes"] == {
        "200 in time": 3, "200 late": 1, "504": 1, "unanswered": 1, "connection lost": 1,
        "not sent, no connection free": 1,
    }  # fmt: skip
    assert figures["refusal_ms"]["max"] == 10.0
    assert figures["client"]["send_delay_ms"]["p50"] == 2.0
    assert (figures["client"]["cpu_share"], figures["client"]["cpu_us_per_query"]) == (0.5, 125000.0)


def test_a_part_is_counted_from_its_own_begin() -> None:
    part = sent((0.0, 0.1, 200), (1.0, 0.05, 200), (1.5, 0.2, 504), (2.0, 0.1, 200)).part(1.0, 2.0)
    assert part.start_s == 51.0
    assert part.scheduled_s.tolist() == [0.0, 0.5]
    assert part.done_s.tolist() == pytest.approx([0.05, 0.7])
    assert part.cpu_s[:, 0].tolist() == [-1.0, 9.0]


def test_each_bar_can_be_missed() -> None:
    below = Phase(Load("below", 10, 1), sent(*[(each / 10, 0.01, 200) for each in range(10)]), SLO_S)
    good = Phase(Load("after", 1, 3), sent((0.5, 0.3, 200), (1.5, 0.01, 200), (2.5, 0.01, 200)), SLO_S)
    bad = Phase(Load("after", 1, 3), sent((0.5, 0.01, 200), (1.5, 0.3, 200)), SLO_S)
    look = Seen(0.0, 0.01, 0.02, 300.0)
    before = {"probes": bench_overload.figures_of([look])}

    def met(goodput: float, seen: Seen, after: Phase = good) -> dict[str, bool]:
        overload = {"goodput": goodput, "probes": bench_overload.figures_of([look, seen])}
        found = bench_overload.verdict([below], before, overload, after)
        return {name: value for name, value in found["met"].items() if not value}

    assert met(9.0, look) == {}
    assert met(8.9, look) == {"goodput": False}
    assert met(9.0, Seen(0.0, 0.01, 0.11, 300.0)) == {"probes": False}
    assert met(9.0, Seen(0.0, float("inf"), 0.01, 300.0)) == {"probes": False}
    assert met(9.0, Seen(0.0, 0.01, 0.01, 365.0)) == {"memory": False}
    assert met(9.0, look, bad) == {"recovery": False}


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_overload.parse_arguments(["--seconds", "0"])
    assert "--seconds: must be above zero" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_reports_each_phase_and_accounts_for_every_query(tmp_path: Path) -> None:
    if not Path(bench_overload.parse_arguments([]).data).exists():
        pytest.skip("needs the images in ../shared/data")
    file = tmp_path / "overload.json"
    command = [sys.executable, "scripts/bench_overload.py", "--saturation", "100", "--seconds", "2", "--rate", "2000"]
    command += ["--step-seconds", "1", "--after-seconds", "2", "--first-rate", "40", "--json", str(file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    document = json.loads(ended.stdout.splitlines()[-1])
    assert document == json.loads(file.read_text())
    names = [row["phase"] for row in document["rows"]]
    assert names == ["below saturation", "moderate before", "overload", "moderate after"]
    assert set(document["met"]) == {"goodput", "memory", "probes", "recovery"}
    for row in document["rows"]:
        assert sum(row["outcomes"].values()) > 0
        assert row["probes"]["asked"] > 0
    assert document["rows"][2]["offered_rate"] > 1800
