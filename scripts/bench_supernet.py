"""Measure the mechanism: switching time, memory against a zoo, and that an actuated subnet equals the extracted one.

Switching is what happens between two batches on different subnets: the look-up by name. Building a subnet's views, once
each, is reported beside it. Memory counts the bytes of weights and statistics (not the allocator's or torch's own). The
zoo are six of the profile's frontier subnets, the ends included, each extracted with its own weights. On a GPU,
building includes waiting for what it computes there. The last line of stdout is one JSON document.

    python scripts/bench_supernet.py --profile profiles/cifar10
    python scripts/bench_supernet.py --profile profiles/cifar10 --device cuda
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from engine import Engine
from servable import Servable, load_servable
from supernet import ActuatedSubnet


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of storage behind the tensors, each storage counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def memory(servable: Servable, frontier: Sequence[str]) -> dict[str, object]:
    """Bytes of the supernet with all that is calibrated, and of a zoo of six frontier subnets."""
    supernet = servable.supernet
    weights = tensor_bytes([*supernet.network.parameters(), *supernet.network.buffers()])
    norms = tensor_bytes(list(supernet.statistics.values()))
    picked = [frontier[round(i * (len(frontier) - 1) / 5)] for i in range(6)]
    zoo = [supernet.extract(supernet.space.parse(name)) for name in picked]
    zoo_bytes = sum(tensor_bytes([*network.parameters(), *network.buffers()]) for network in zoo)
    return {
        "weights_bytes": weights,
        "statistics_bytes": norms,
        "calibrated_subnets": len(supernet.statistics),
        "zoo": picked,
        "zoo_bytes": zoo_bytes,
        "supernet_to_zoo": round((weights + norms) / zoo_bytes, 4),
    }


def switching(servable: Servable, seed: int, device: str) -> dict[str, object]:
    """Microseconds to switch between random subnets of the whole space, and to build one for the first time.

    The supernet is on this device afterwards.
    """
    engine = Engine(servable, device)
    names = [subnet.name for subnet in servable.supernet.space]
    rng = random.Random(seed)
    built, switched = [], []
    for name in names:
        started_s = time.perf_counter()
        engine.actuate(name)
        built.append(time.perf_counter() - started_s)
    for _ in range(20_000):
        name = rng.choice(names)
        started_s = time.perf_counter()
        engine.actuate(name)
        switched.append(time.perf_counter() - started_s)
    engine.close()
    return {
        "device": asdict(engine.facts),
        "subnets": len(names),
        "actuation_us_median": round(statistics.median(switched) * 1e6, 2),
        "actuation_us_p99": round(statistics.quantiles(switched, n=100)[98] * 1e6, 2),
        "first_time_us_median": round(statistics.median(built) * 1e6, 1),
    }


def equality(servable: Servable, seed: int, subnets: int = 50) -> dict[str, object]:
    """Largest difference of logits between actuated and extracted subnets, alone and with two running at once.

    They run where the supernet is.
    """
    rng = random.Random(seed)
    spec = servable.input
    x = torch.randn(8, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(seed))
    x = x.to(servable.supernet.device)
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits of mantissa are no difference between the two
    calibrated = rng.sample(sorted(servable.supernet.statistics, key=lambda each: each.name), subnets)
    pairs = [(servable.supernet.actuate(subnet), servable.supernet.extract(subnet)) for subnet in calibrated]
    alone = max(_difference(actuated, network, x) for actuated, network in pairs)
    return {"compared": len(pairs), "largest_difference": alone, "largest_difference_two_threads": _together(pairs, x)}


def _difference(actuated: ActuatedSubnet, network: nn.Module, x: Tensor) -> float:
    with torch.inference_mode():
        return float((actuated(x) - network(x)).abs().max())


def _together(pairs: Sequence[tuple[ActuatedSubnet, nn.Module]], x: Tensor) -> float:
    differences: list[float] = []

    def run(part: Sequence[tuple[ActuatedSubnet, nn.Module]]) -> None:
        for _ in range(5):
            differences.extend(_difference(actuated, network, x) for actuated, network in part)

    threads = [threading.Thread(target=run, args=(pairs[start::2],)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(differences)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, default=Path("profiles/cifar10"), help="folder of the servable")
    parser.add_argument("--seed", type=int, default=0, help="of the subnets that are looked at")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    servable = load_servable(options.profile)
    found = slackfit.load_choices(options.profile)
    choices = [choice for choice in found if choice.frontier and choice.ensemble is None]
    frontier = [choice.name for choice in sorted(choices, key=lambda each: each.accuracy)]
    document = {
        "profile": str(options.profile),
        "machine": platform.platform(),
        "torch": torch.__version__,
        "seed": options.seed,
        **memory(servable, frontier),
        **switching(servable, options.seed, options.device),
        **equality(servable, options.seed),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
