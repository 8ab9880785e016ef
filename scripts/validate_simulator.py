"""Check the simulator against the server: the same arrivals through both, load by load and policy by policy.

The server answers real images over HTTP (scripts/replay.py), fresh for each run; the simulator gets the server's
latency table with its median latencies, and the time from a batch's end to the client that the server's run showed.
Loads are fractions of ``--capacity``, the rate that the fastest subnet can serve here. The last line of stdout is one
JSON document: for each pair attainment and mean serving accuracy of both, and by how much they differ.

    python scripts/validate_simulator.py --capacity 1200
    python scripts/validate_simulator.py --capacity 1200 --loads 0.3 --policies clearfit --duration 20
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

import slackfit  # noqa: E402 the path is set above
from config import Config  # noqa: E402
from scripts import bench_serving, simulate  # noqa: E402
from wholefile import write_text  # noqa: E402


def compare(options: argparse.Namespace, table: Path, load: float, policy: str, scratch: Path) -> dict[str, Any]:
    """One load and policy through the server, then through the simulator."""
    rate = load * options.capacity
    workload = ["--poisson", f"{rate:.3f}", "--duration", f"{options.duration:g}", "--slo-ms", f"{options.slo_ms:g}"]
    if options.trace:
        squeezed, duration_s = bench_serving.squeezed(options.trace, rate, options.duration)
        workload[:4] = ["--trace", options.trace, "--rate", f"{squeezed:.3f}", "--duration", f"{duration_s:.3f}"]
    with bench_serving.server(options.profile, policy, []) as running:
        served = bench_serving.replay(running.url, [*workload, "--data", options.data], scratch / "served.json")
    answer_ms = max(0.0, served["latency_ms"]["p50"] - served["server_latency_ms"]["p50"])
    flags = [
        "--policy",
        policy,
        "--service",
        "p50",
        "--margin",
        str(Config().margin),
        "--answer-ms",
        f"{answer_ms:.3f}",
    ]
    simulated = simulate.report(simulate.parse_arguments(["--table", str(table), *workload, *flags]))
    figures = ("attainment", "mean_serving_accuracy")
    return {
        "load": load,
        "policy": policy,
        "rate": round(rate, 1),
        "answer_ms": round(answer_ms, 2),
        **{f"{each}_server": round(served[each] or 0.0, 5) for each in figures},
        **{f"{each}_simulator": round(simulated[each] or 0.0, 5) for each in figures},
        "attainment_error": round(simulated["attainment"] - served["attainment"], 5),
        "accuracy_error": round((simulated[figures[1]] or 0.0) - (served[figures[1]] or 0.0), 5),
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = HOUSE.parent / "shared" / "data"
    parser.add_argument("--profile", type=Path, default=HOUSE / "profiles" / "cifar10", help="folder of the servable")
    parser.add_argument("--data", default=str(shared / "cifar10_jpeg.npz"), help="images; see replay.py")
    parser.add_argument("--trace", default="", help="arrivals of this trace, squeezed; Poisson when not given")
    parser.add_argument("--capacity", type=float, required=True, help="queries/s, as bench_serving.py finds it")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8], help="fractions of the capacity"
    )
    parser.add_argument("--policies", nargs="+", default=["clearfit", "slackfit"], help="default: clearfit slackfit")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of each run (default: 30)")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="SLO of each query (default: 100)")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all pairs and print them."""
    options = parse_arguments(arguments)
    try:
        simulate.load_table(options.profile)
    except slackfit.ProfileError as error:
        sys.exit(f"validate_simulator.py: {error}")
    plan = [(load, policy) for load in options.loads for policy in options.policies]
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            compare(options, options.profile, load, policy, Path(scratch))
            for load, policy in tqdm(plan, desc="runs", disable=None)
        ]
    print("each first on the server, then in the simulator:")
    for row in rows:
        attainments = f"{row['attainment_server']:.4f} {row['attainment_simulator']:.4f}"
        accuracies = f"{row['mean_serving_accuracy_server']:.4f} {row['mean_serving_accuracy_simulator']:.4f}"
        print(f"{row['load']:.0%} {row['policy']:<12} attainment {attainments}  accuracy {accuracies}")
    document = {"profile": str(options.profile), "slo_ms": options.slo_ms, "duration_s": options.duration, "rows": rows}
    if options.out:
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
