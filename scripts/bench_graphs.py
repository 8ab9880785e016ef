"""Measure what holding subnets ready brings: the engine without a memory budget beside one with as much as it can use.

On a GPU that is CUDA graphs against kernels started one by one. Both engines take turns in one run; a latency is the
median from submitting a batch of pixels to having its result on the host. 3 and 33 are padded to 4 and 64 on a graph.
The last line of stdout is one JSON document.

    python scripts/bench_graphs.py --profile profiles/cifar10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from engine import Engine, measure_latencies
from servable import load_servable

BATCH_SIZES = (1, 3, 4, 8, 16, 33, 64)
TURNS, ROUNDS = 5, 8


def medians_ms(engines: Sequence[Engine], names: Sequence[str]) -> list[dict[str, list[float]]]:
    """Per engine, per subnet, one latency for each of BATCH_SIZES."""
    samples: list[dict[str, list[list[float]]]] = [{name: [[] for _ in BATCH_SIZES] for name in names} for _ in engines]
    for _ in range(TURNS):
        for engine, kept in zip(engines, samples, strict=True):
            measured = asyncio.run(measure_latencies(engine, names, BATCH_SIZES, ROUNDS, lambda: None))
            for name, sizes in measured.items():
                for into, each_s in zip(kept[name], sizes, strict=True):
                    into += each_s
    return [
        {name: [round(statistics.median(each) * 1e3, 4) for each in sizes] for name, sizes in kept.items()}
        for kept in samples
    ]


def compare(profile: Path, device: str, workers: int) -> dict[str, object]:
    """Prepare both engines, measure, and print a table."""
    frontier = [choice.name for choice in slackfit.load_choices(profile) if choice.frontier and not choice.ensemble]
    names = [frontier[0], frontier[-1]]
    without = Engine(load_servable(profile), device, workers=workers, memory_budget=0)
    ready = Engine(load_servable(profile), device, workers=workers, memory_budget=math.inf)
    asyncio.run(without.prepare(frontier))
    began_s = time.perf_counter()
    asyncio.run(ready.prepare(frontier))
    prepared_s, held = time.perf_counter() - began_s, ready.held
    plain, fast = medians_ms((without, ready), names)
    print(f"{'subnet':<28}{'batch':>6}{'without, ms':>13}{'held, ms':>10}{'ratio':>7}")
    for name in names:
        for size, one, other in zip(BATCH_SIZES, plain[name], fast[name], strict=True):
            print(f"{name:<28}{size:>6}{one:>13.3f}{other:>10.3f}{other / one:>7.2f}")
    facts = asdict(ready.facts)
    without.close()
    ready.close()
    return {
        "machine": platform.platform(), "device": facts, "batch_sizes": BATCH_SIZES, "without_ms": plain,
        "held_ms": fast, "subnets_held": len(held.subnets), "pairs_held": len(held.pairs), "held_bytes": held.nbytes,
        "prepared_s": round(prepared_s, 2),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True, help="folder of the servable")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, default=1, help="batches in flight")
    options = parser.parse_args(arguments)
    try:
        report = compare(options.profile, options.device, options.workers)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"bench_graphs.py: {error}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
