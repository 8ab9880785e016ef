"""Measure hundreds of subnets of OFA ResNet50: memory against the bare supernet and against a zoo, and switching.

The supernet has random weights and small images: neither changes what is measured. Subnets are drawn from the official
space along the whole range of sizes and calibrated; their statistics are packed (``Supernet.pack_statistics``). Bytes
are those of tensors: weights, running statistics, statistics of all subnets. What the process takes beside (views,
tuples, names) is in ``resident_growth_bytes``: how much its resident memory grew from before the first calibration
until every subnet was actuated, once the allocator has given back what is free.

Switching is what happens between two batches: the look-up of an actuated subnet. One that is not among the last that
ran also unpacks its statistics, which is reported beside it. The zoo are six of these subnets, their sizes as evenly
from the smallest to the largest as there are, each extracted with its own weights.

    python scripts/bench_families.py --subnets 500 --side 32
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import supernets
from scripts.bench_supernet import tensor_bytes
from supernet import PackedSettings, Supernet, count_parameters
from supernets import ofa_resnet

WARM_UP = 12  # subnets calibrated before memory is looked at: kernels and code that are loaded once
CANDIDATES = 60  # for the zoo: counting takes a moment each
BARS = {"memory_to_bare": 1.15, "actuation_us": 50.0, "memory_to_zoo": 1 / 2.6}


def build(classes: int, seed: int) -> Supernet:
    """OFA ResNet50 with random weights."""
    torch.manual_seed(seed)
    network, elastic = supernets.build("ofa_resnet", {"classes": classes})
    return Supernet(network.requires_grad_(False).eval(), elastic, ofa_resnet.official_space())


def draw(supernet: Supernet, count: int, seed: int) -> list[Any]:
    """Different subnets along the whole range of sizes: the ends, and ends of which more or less was drawn anew."""
    rng, ends = random.Random(seed), [supernet.space.smallest, supernet.space.largest]
    drawn = dict.fromkeys(ends)
    while len(drawn) < count:
        drawn[supernet.space.mutate(rng.choice(ends), rng, probability=rng.random())] = None
    return list(drawn)


def calibrate(
    supernet: Supernet, subnets: Sequence[Any], batches: Sequence[Tensor], step: Callable[[], object]
) -> None:
    """Statistics of all subnets, packed as they come."""
    for subnet in subnets:
        supernet.calibrate(subnet, batches)
        supernet.pack_statistics()
        step()


def resident_bytes() -> int:
    """Resident memory of this process, once the allocator has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def microseconds(runs: Sequence[float], name: str) -> dict[str, float]:
    """Median and 99th percentile."""
    percentiles = statistics.quantiles(runs, n=100)
    return {f"{name}_us_p50": round(percentiles[49] * 1e6, 2), f"{name}_us_p99": round(percentiles[98] * 1e6, 2)}


def switching(supernet: Supernet, subnets: Sequence[Any], seed: int, times: int = 20_000) -> dict[str, float]:
    """Time to find an actuated subnet, and to unpack the statistics of one that did not run lately."""
    rng, found, unpacked = random.Random(seed), [], []
    for subnet in rng.choices(subnets, k=times):
        started_s = time.perf_counter()
        supernet.actuate(subnet)
        found.append(time.perf_counter() - started_s)
    for subnet in subnets:  # more than are held unpacked, so that each is anew
        settings = supernet.actuate(subnet).settings
        assert isinstance(settings, PackedSettings), "all were packed"
        started_s = time.perf_counter()
        settings.unpacked()
        unpacked.append(time.perf_counter() - started_s)
    return microseconds(found, "actuation") | microseconds(unpacked, "unpacking")


def memory(supernet: Supernet, subnets: Sequence[Any]) -> dict[str, Any]:
    """Bytes of weights and statistics, against the bare supernet and against a zoo of six."""
    bare = tensor_bytes([*supernet.network.parameters(), *supernet.network.buffers()])
    kept = tensor_bytes(list(supernet.statistics.values()))
    classes = supernet.network.get_parameter("classifier.linear.bias").shape[0]
    with torch.device("meta"):  # to count, without memory
        network, elastic = supernets.build("ofa_resnet", {"classes": classes})
    sizes = Supernet(network, elastic, supernet.space)
    counts = {each: count_parameters(sizes.extract(each)) for each in subnets[:CANDIDATES]}  # the ends come first
    least, most = min(counts.values()), max(counts.values())
    targets = [least + (most - least) * index / 5 for index in range(6)]
    picked = [min(counts, key=lambda each: abs(counts[each] - target)) for target in targets]
    zoo = [sizes.extract(each) for each in picked]
    zoo_bytes = sum(each.nbytes for network in zoo for each in [*network.parameters(), *network.buffers()])
    return {
        "bare_bytes": bare,
        "statistics_bytes": kept,
        "statistics_bytes_per_subnet": round(kept / len(subnets)),
        "memory_to_bare": round((bare + kept) / bare, 4),
        "zoo": [each.name for each in picked],
        "zoo_parameters": [counts[each] for each in picked],
        "zoo_bytes": zoo_bytes,
        "memory_to_zoo": round((bare + kept) / zoo_bytes, 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--subnets", type=int, default=500, help="how many to calibrate (default: %(default)s)")
    add("--side", type=int, default=32, help="pixels a side (default: %(default)s)")
    add("--images", type=int, default=4, help="of the one calibration batch (default: %(default)s)")
    add("--classes", type=int, default=1000, help="default: %(default)s, as the official checkpoint")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, images and subnets")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    supernet = build(options.classes, options.seed)
    subnets = draw(supernet, options.subnets, options.seed)
    batch = torch.randn(options.images, 3, options.side, options.side)
    calibrate(supernet, draw(supernet, WARM_UP, options.seed + 1), [batch], lambda: None)
    supernet.statistics.clear()
    supernet.forget()
    before = resident_bytes()
    with tqdm(total=len(subnets), unit=" subnets", disable=None) as bar:
        calibrate(supernet, subnets, [batch], bar.update)
    for subnet in subnets:
        supernet.actuate(subnet)
    grown = resident_bytes() - before
    measured = memory(supernet, subnets)
    document = {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "seed": options.seed,
        "threads": options.threads,
        "subnets": len(subnets),
        "side": options.side,
        **measured,
        "resident_growth_bytes": grown,
        "resident_to_bare": round(1 + grown / measured["bare_bytes"], 4),
        **switching(supernet, subnets, options.seed),
        "bars": BARS,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
