"""What a busy neighbour does to deadlines: a replay during which another program takes half of the processors.

Poisson arrivals at a moderate rate, against a fresh server; for the middle third of the run one process per core does
nothing but compute, so that the scheduler gives every core to it about half of the time. Once with the server following
the slowdown, once believing its table (``--no-correction``). The last line of stdout is one JSON document.

    python scripts/bench_slowdown.py
    python scripts/bench_slowdown.py --rate 200 --duration 30
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

from scripts import bench_serving  # noqa: E402 the path is set above


class Neighbour:
    """One spinning process per core, from ``start_s`` seconds after now for ``length_s`` seconds."""

    def __init__(self, start_s: float, length_s: float) -> None:
        self._length_s = length_s
        self._timer = threading.Timer(start_s, self._spin)
        self._timer.start()

    def _spin(self) -> None:
        program = f"import time\nend = time.monotonic() + {self._length_s}\nwhile time.monotonic() < end: pass"
        self._processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(os.cpu_count() or 1)]

    def wait(self) -> None:
        """Return when it is over."""
        self._timer.join()
        for process in self._processes:
            process.wait()


def run(options: argparse.Namespace, name: str, flags: Sequence[str], out: Path) -> dict[str, Any]:
    """One replay beside the neighbour; attainment and accuracy of each third."""
    third_s = options.duration / 3
    with bench_serving.server(options.profile, options.policy, flags) as running:
        neighbour = Neighbour(third_s + options.lead, third_s)
        arguments = [
            "--poisson", f"{options.rate:g}", "--duration", f"{options.duration:g}", "--slo-ms", f"{options.slo_ms:g}",
            "--data", options.data, "--label", name, "--plot", str(out / f"slowdown-{name}.png"),
        ]  # fmt: skip
        report = bench_serving.replay(running.url, arguments, out / f"slowdown-{name}.json")
        neighbour.wait()
    return {
        "run": name,
        **{key: report[key] for key in ("queries", "attainment", "mean_serving_accuracy", "latency_ms", "outcomes")},
        "thirds": [_part(report["timeline"], third_s, part) for part in range(3)],
    }


def _part(timeline: dict[str, Any], third_s: float, part: int) -> dict[str, float]:
    """Attainment and mean serving accuracy of one third of a run."""
    rows = zip(timeline["time_s"], timeline["arrivals"], timeline["attainment"], timeline["accuracy"], strict=True)
    bins = [row for row in rows if part * third_s <= row[0] < (part + 1) * third_s and row[1]]
    arrivals = sum(row[1] for row in bins)
    in_time = [(row[1] * row[2], row[3]) for row in bins if row[2]]
    served = sum(count for count, _ in in_time)
    accuracy = sum(count * accuracy for count, accuracy in in_time) / served if served else 0.0
    return {"attainment": round(served / arrivals, 4), "accuracy": round(accuracy, 4)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = HOUSE.parent / "shared" / "data"
    parser.add_argument("--profile", type=Path, default=HOUSE / "profiles" / "cifar10", help="folder of the servable")
    parser.add_argument("--policy", default="clearfit", help="see superserve --help (default: clearfit)")
    parser.add_argument("--data", default=str(shared / "cifar10_jpeg.npz"), help="images; see replay.py")
    parser.add_argument("--rate", type=float, default=300.0, help="mean arrivals per second (default: 300)")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of each run (default: 60)")
    parser.add_argument("--lead", type=float, default=1.5, help="seconds that the client needs before its first query")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="SLO of each query (default: 100)")
    parser.add_argument("--rounds", type=int, default=1, help="how often both are run, in turns (default: 1)")
    parser.add_argument("--out", type=Path, help="folder for reports and plots (default: a temporary one)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both in turns, print."""
    options = parse_arguments(arguments)
    runs = [("corrected", []), ("uncorrected", ["--no-correction"])] * options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        out = (options.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        rows = [run(options, name, flags, out) for name, flags in tqdm(runs, desc="runs", disable=None)]
    for row in rows:
        thirds = "  ".join(f"{each['attainment']:.4f}/{each['accuracy']:.4f}" for each in row["thirds"])
        print(f"{row['run']:<12} attainment {row['attainment']:.4f}  attainment/accuracy by third: {thirds}")
    document = {"cores": os.cpu_count(), "rate": options.rate, "slo_ms": options.slo_ms, "rows": rows}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
