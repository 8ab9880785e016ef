"""Measure the whole server: real images over real sockets, from a second process, at several loads and policies.

First the rate is searched that the fastest subnet alone can serve (attainment 0.99 with Poisson arrivals); loads are
fractions of it. Then, load by load, each policy serves the same seconds of the same trace, each with a fresh server,
and start time and resident memory are noted. Client and server share this machine's processors, as they would at the
edge; what is measured includes HTTP, decoding and the client's own delay. The last line of stdout is one JSON document;
--out keeps it, every run's report and a plot for each load; it is written anew after each run.

    python scripts/bench_serving.py
    python scripts/bench_serving.py --loads 0.5 --duration 10 --policies clearfit
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

from scripts import workloads  # noqa: E402 the path is set above
from scripts.provenance import commit  # noqa: E402
from wholefile import write_text  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server process that is ready."""

    url: str
    pid: int
    ready_s: float

    def resident_mb(self) -> float:
        """Resident memory now, in MB of 2**20 bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextlib.contextmanager
def server(profile: Path, policy: str, flags: Sequence[str]) -> Iterator[Running]:
    """A fresh server on a free port; SIGTERM at the end, and an error if it does not exit cleanly."""
    command = [sys.executable, "superserve.py", "--profile", str(profile), "--policy", policy, "--port", "0", *flags]
    started_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=HOUSE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None, "stderr was asked for"
    try:
        url = _listening(process.stderr)
        _wait_until_ready(url)
        yield Running(url=url, pid=process.pid, ready_s=time.perf_counter() - started_s)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        if process.returncode:
            sys.exit(f"the server ended with exit code {process.returncode}:\n{errors}")


def _listening(lines: Iterator[str]) -> str:
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event["event"] == "listening":
                return str(event["url"])
        print(line, end="", file=sys.stderr)
    sys.exit("the server did not start")


def _wait_until_ready(url: str) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz"):
                return
        except urllib.error.HTTPError:
            time.sleep(0.02)


def replay(url: str, arguments: Sequence[str], report: Path) -> dict[str, Any]:
    """One run of scripts/replay.py against a server; its report."""
    command = [sys.executable, "scripts/replay.py", "--url", url, "--json", str(report), *arguments]
    subprocess.run(command, cwd=HOUSE, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    document: dict[str, Any] = json.loads(report.read_text())
    return document


def search_capacity(options: argparse.Namespace, scratch: Path) -> float:
    """The highest Poisson rate, in steps of a tenth, that the fastest subnet serves with attainment 0.99."""
    rate, reached = options.first_rate, 0.0
    with server(options.profile, "fixed:smallest", options.flags) as running:
        while True:
            common = ["--slo-ms", f"{options.slo_ms:g}", "--data", options.data, "--duration", "6"]
            report = replay(running.url, ["--poisson", f"{rate:g}", *common], scratch / "capacity.json")
            print(f"fastest subnet at {rate:.0f}/s: attainment {report['attainment']:.4f}", file=sys.stderr)
            if report["attainment"] < 0.99:
                return reached
            reached, rate = rate, round(rate * 1.1, 1)


def squeezed(trace: str, rate: float, duration_s: float) -> tuple[float, float]:
    """How to squeeze a trace so that its first ``duration_s`` seconds have this mean rate.

    Returns the mean rate of the whole trace, squeezed so (replay.py's --rate), and the duration, which is shorter where
    the trace has too few arrivals.
    """
    arrivals = workloads.load_trace(Path(trace))
    wanted = min(len(arrivals) - 1, round(rate * duration_s))
    duration_s = wanted / rate
    return float(workloads.describe(arrivals).mean_rate * arrivals[wanted] / duration_s), duration_s


def possible(options: argparse.Namespace, rate: float, duration_s: float, capacity: float) -> float:
    """The attainment of a server that knew the future and spent exactly 1/capacity seconds on each query.

    With equal service times and SLOs, serving in order and skipping what would be late is optimal.
    """
    times = workloads.window(workloads.squeeze(workloads.load_trace(Path(options.trace)), rate), 0, duration_s)
    free_s, served = 0.0, 0
    for arrival in times:
        done_s = max(free_s, arrival) + 1 / capacity
        if done_s <= arrival + options.slo_ms / 1e3:
            free_s, served = done_s, served + 1
    return round(served / len(times), 4)


def run_all(options: argparse.Namespace, capacity: float, out: Path) -> Iterator[dict[str, Any]]:
    """Every load with every policy; one row each, as soon as it is there."""
    plan = [(load, policy) for load in options.loads for policy in options.policies]
    for load, policy in tqdm(plan, desc="runs", disable=None):
        with server(options.profile, policy, options.flags) as running:
            fresh_mb = running.resident_mb()
            name = f"load{round(load * 100)}-{policy.replace(':', '-')}"
            rate, duration_s = squeezed(options.trace, capacity * load, options.duration)
            arguments = [
                "--trace", options.trace, "--rate", f"{rate:.3f}", "--duration", f"{duration_s:.3f}",
                "--slo-ms", f"{options.slo_ms:g}", "--data", options.data, "--label", f"{policy}, {load:.0%} load",
                "--plot", str(out / f"{name}.png"),
            ]  # fmt: skip
            report = replay(running.url, arguments, out / f"{name}.json")
            row = _row(load, policy, capacity * load, running, fresh_mb, report)
            row["attainment_possible"] = possible(options, rate, duration_s, capacity)
            print(json.dumps(row), file=sys.stderr)
            yield row


def _row(
    load: float, policy: str, rate: float, running: Running, fresh_mb: float, report: dict[str, Any]
) -> dict[str, Any]:
    wanted = (
        "queries", "attainment", "attainment_server", "mean_serving_accuracy", "observed_accuracy", "latency_ms",
        "send_delay_ms", "outcomes", "workload",
    )  # fmt: skip
    return {
        "load": load,
        "policy": policy,
        "rate": round(rate, 1),
        "ready_s": round(running.ready_s, 2),
        "resident_mb_at_start": round(fresh_mb, 1),
        "resident_mb_at_end": round(running.resident_mb(), 1),
        **{name: report[name] for name in wanted if name in report},
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = HOUSE.parent / "shared" / "data"
    parser.add_argument("--profile", type=Path, default=HOUSE / "profiles" / "cifar10", help="folder of the servable")
    parser.add_argument("--trace", default=str(shared / "traces" / "twitter_normal.txt.gz"), help="see replay.py")
    parser.add_argument("--data", default=str(shared / "cifar10_jpeg.npz"), help="images; see replay.py")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.9], help="fractions of the capacity")
    policies = ["clearfit", "slackfit", "fixed:largest", "fixed:smallest"]
    parser.add_argument("--policies", nargs="+", default=policies, help=f"default: {' '.join(policies)}")
    parser.add_argument("--capacity", type=float, default=0.0, help="queries/s; searched when not given")
    parser.add_argument("--first-rate", type=float, default=400.0, help="where the search for the capacity begins")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of each run")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="SLO of each query (default: 100)")
    parser.add_argument("--out", type=Path, help="folder for reports and plots (default: a temporary one)")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="last: all further flags go to the server"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search the capacity, run, print."""
    options = parse_arguments(arguments)
    for path in (options.trace, options.data):
        if not Path(path).exists() and path != "digits":
            sys.exit(f"bench_serving.py: {path} is not there; name another with --trace and --data")
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        capacity = options.capacity or search_capacity(options, Path(scratch))
        document: dict[str, Any] = {
            "commit": commit(), "cores": os.cpu_count(), "slo_ms": options.slo_ms, "trace": options.trace,
            "duration_s": options.duration, "capacity_qps": round(capacity, 1),
            "flags": options.flags, "rows": [],
        }  # fmt: skip
        for row in run_all(options, capacity, out.resolve()):
            document["rows"].append(row)
            write_text(out / "serving.json", json.dumps(document, indent=1) + "\n")
        print(json.dumps(document))


if __name__ == "__main__":
    main()
