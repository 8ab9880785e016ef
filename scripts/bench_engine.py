"""Measure the engine: executables of actuated subnets against the same networks alone, in torch and ONNX Runtime.

For the smallest, middle and largest subnet of the frontier (by accuracy) and each batch size, all with the same number
of CPU threads, the median wall-clock time of one batch of

  budget0              the actuated subnet's executable on the shared weights, which folds slices on the way
  default              its executable with packed weights, as far as the default budget holds them (column held)
  extracted_eager      the extracted network in plain torch: channels-last, inference mode
  extracted_compiled   the same compiled by torch.jit.trace, torch.jit.freeze and torch.jit.optimize_for_inference,
                       which fold norms and pack weights (not by torch.compile, which needs a C++ compiler)
  onnxruntime          the same in ONNX Runtime, which optimises the graph as it does unless told otherwise

Inputs lie ready in memory as each wants them. What is compared runs in turn, so that a slow moment of the machine falls
on all alike; the first rounds warm up. All must give the logits of the actuated subnet to 1e-4, or the script fails.
Batches above 16 are computed in parts by the executables, as the engine does, and whole by the others. packed_bytes is
what a subnet would hold alone; those that are held share large slices. With ``--clock processor`` all times are
processor time of the process, which other work on the machine distorts far less; on one thread it is the same on a
machine of its own.

Actuation is the engine's look-up by name between two batches on subnets of the frontier, with the default budget. The
curve over memory budgets holds subnets in the profile's order, as the server does; a subnet's latency at a budget is
that of its packed executable if held, else of the shared one. Bytes held are counted. For resident memory an engine in
a process of its own gets all subnets ready within the budget and runs them: resident_growth_bytes is how much more that
takes than with budget 0 (null where the system does not tell). zoo_memory_ratio: the supernet with all statistics to
six separate networks. The last line of stdout is JSON.

    python scripts/bench_engine.py
    python scripts/bench_engine.py --subnets all --batches 1 8 --rounds 10
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import importlib.util
import io
import json
import math
import platform
import random
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from config import Config
from engine import CHUNK, Engine
from executables import CannotFuseError, ExecutableCache, trace
from scripts.bench_supernet import memory, tensor_bytes
from servable import Servable, load_servable
from supernet import Supernet, SupernetError

TOLERANCE, WARM_UP, FEWEST = 1e-4, 3, 3  # the latter two in rounds
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
BUDGETS = ("0", "1x", "2x", "4x", "8x")
CURVE_BATCH, CURVE_SECONDS = 8, 40.0

Network = Callable[[Tensor], Tensor]
Runs = Mapping[str, Callable[[], Tensor]]
Step = Callable[[], object]


# ------------------------------------------------------------------------------------------------- compared networks


def by_default(supernet: Supernet, names: Sequence[str]) -> ExecutableCache:
    """What an engine with the default budget holds of these subnets."""
    cache = ExecutableCache(Config().memory_budget_bytes(supernet.nbytes))
    for name in names:
        cache.add(name, supernet.actuate(supernet.space.parse(name)))
    cache.fill()
    return cache


def networks_of(
    supernet: Supernet, name: str, default: Network, x: Tensor, threads: int
) -> tuple[dict[str, Network], dict[str, Any]]:
    """All forms of a subnet, for inputs like ``x``, and their sizes; ``default`` is one of them."""
    actuated = supernet.actuate(supernet.space.parse(name))
    extracted = supernet.extract(actuated.subnet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shared = trace(actuated)
    with warnings.catch_warnings(action="ignore"):  # that torch.jit and this exporter have successors
        compiled, exported = compiled_of(extracted, x), exported_of(extracted, x)
    weights = tensor_bytes([*extracted.parameters(), *extracted.buffers()])
    alone = sum(part.packed_nbytes for step in shared.steps for part in step.parts)
    sizes = {"packed_bytes": alone, "extracted_bytes": weights, "onnx_bytes": len(exported)}
    executables = {"budget0": partial(in_parts, shared), "default": partial(in_parts, default)}
    separate = {"extracted_eager": extracted, "extracted_compiled": compiled}
    return {**executables, **separate, "onnxruntime": onnxruntime_of(exported, threads)}, {"subnet": name, **sizes}


def in_parts(executable: Network, x: Tensor) -> Tensor:
    """A batch as the engine's workers compute it."""
    if len(x) <= CHUNK:
        return executable(x)
    return torch.cat([executable(part) for part in x.tensor_split(-(-len(x) // CHUNK))])


def compiled_of(network: nn.Module, example: Tensor) -> Network:
    """The network compiled by torch."""
    frozen = torch.jit.freeze(torch.jit.trace(network, example))  # type: ignore[no-untyped-call]
    return cast(Network, torch.jit.optimize_for_inference(frozen))


def exported_of(network: nn.Module, example: Tensor) -> bytes:
    """The network as an ONNX file that takes batches of any size."""
    file, batch = io.BytesIO(), {0: "batch"}
    axes = {"input": batch, "logits": batch}
    names = {"input_names": ["input"], "output_names": ["logits"]}
    torch.onnx.export(network, (example,), file, dynamo=False, dynamic_axes=axes, **names)  # type: ignore[arg-type]
    return file.getvalue()


def onnxruntime_of(exported: bytes, threads: int) -> Network:
    """What runs an ONNX file on contiguous inputs."""
    import onnxruntime  # type: ignore[import-untyped]  # may be missing, which main tells

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def inputs(servable: Servable, count: int, seed: int) -> Tensor:
    """A batch of random inputs, channels-last in memory as the engine makes them."""
    spec, generator = servable.input, torch.Generator().manual_seed(seed)
    x = torch.randn(count, spec.channels, spec.height, spec.width, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------------------- timing


@torch.inference_mode()
def interleaved(
    runs: Runs, rounds: int, seconds: float, step: Step, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median milliseconds of each; fewer rounds than asked for, but at least three, once they take so long."""
    for run in list(runs.values()) * WARM_UP:
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    began_s = time.perf_counter()
    for number in range(rounds):
        step()
        if number >= FEWEST and time.perf_counter() - began_s > seconds:
            continue  # the bar runs on
        for name, run in runs.items():
            started_s = clock()
            run()
            samples[name].append(clock() - started_s)
    return {name: round(statistics.median(taken) * 1e3, 4) for name, taken in samples.items()}


@torch.inference_mode()
def check(where: str, runs: Runs, expected: Tensor) -> None:
    """End the script unless all give these logits."""
    for name, run in runs.items():
        difference = float((run() - expected).abs().max())
        if not difference <= TOLERANCE:
            sys.exit(f"bench_engine.py: {where}: {name} differs by {difference:.2g} from the actuated subnet")


def compare(
    servable: Servable, name: str, default: ExecutableCache, options: argparse.Namespace, step: Step
) -> tuple[list[Any], dict[str, Any]]:
    """Latencies of a subnet's forms by batch size, and their sizes; ``default``: what the default budget holds."""
    example = inputs(servable, 1, options.seed)
    networks, sizes = networks_of(servable.supernet, name, default.get(name), example, options.threads)
    rows = []
    for batch in options.batches:
        x = inputs(servable, batch, options.seed)
        plain = x.contiguous()
        runs = {form: partial(run, plain if form == "onnxruntime" else x) for form, run in networks.items()}
        check(f"{name}, batch {batch}", runs, servable.supernet.actuate(servable.supernet.space.parse(name))(x))
        medians_ms = interleaved(runs, options.rounds, options.seconds, step, CLOCKS[options.clock])
        row = {"subnet": name, "batch": batch} | {f"{form}_ms": median for form, median in medians_ms.items()}
        row["budget0_to_eager"] = round(medians_ms["budget0"] / medians_ms["extracted_eager"], 3)
        row["default_to_onnxruntime"] = round(medians_ms["default"] / medians_ms["onnxruntime"], 3)
        row["held"] = name in default.held
        rows.append(row)
    return rows, sizes


# -------------------------------------------------------------------------------------------- actuation, memory budget


def switching(servable: Servable, names: Sequence[str], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Microseconds in which an engine with the default budget finds what runs the next batch; what that holds."""
    budget, taken = Config().memory_budget_bytes(servable.supernet.nbytes), []
    engine = Engine(servable, "cpu", memory_budget=budget)
    asyncio.run(engine.prepare(names))
    assert engine.executables is not None, "a CPU has them"
    names_held = list(engine.executables.held)
    held = {"default_held": len(names_held), "default_held_bytes": engine.executables.nbytes}
    for name in random.Random(seed).choices(names, k=20_000):
        started_s = time.perf_counter()
        engine._network(name)
        taken.append((time.perf_counter() - started_s) * 1e6)
    engine.close()
    p99 = statistics.quantiles(taken, n=100)[98]
    times = {"actuation_us": round(statistics.median(taken), 2), "actuation_us_p99": round(p99, 2)}
    return times, {"default_budget_bytes": int(budget), **held, "default_held_subnets": names_held}


def resident_bytes() -> int | None:
    """Resident memory of this process once what was freed went back to the system; None where that is not told."""
    with contextlib.suppress(AttributeError, OSError):  # another system
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return None


def resident_with(budget: str, profile: Path, names: Sequence[str], seed: int) -> int | None:
    """Resident memory of this process with an engine that got these subnets ready within a budget, and ran them."""
    torch.set_num_threads(1)  # more of them would only add memory of their own
    servable = load_servable(profile)
    nbytes = Config(memory_budget=budget).memory_budget_bytes(servable.supernet.nbytes)
    engine = Engine(servable, "cpu", memory_budget=nbytes)
    asyncio.run(engine.prepare(names))
    assert engine.executables is not None, "a CPU has them"
    with torch.inference_mode():
        for x in (inputs(servable, count, seed) for count in (1, CURVE_BATCH)):
            for name in names:
                engine.executables.get(name)(x)
    return resident_bytes()


def resident_growth(profile: Path, names: Sequence[str], budgets: Sequence[str], seed: int) -> list[int | None]:
    """By how much each budget makes a process larger than the first of them; each in a process of its own."""
    apart = get_context("spawn")
    with ProcessPoolExecutor(1, apart, max_tasks_per_child=1) as pool:
        found = list(pool.map(partial(resident_with, profile=profile, names=names, seed=seed), budgets))
    return [None if each is None or found[0] is None else each - found[0] for each in found]


def budget_curve(servable: Servable, names: Sequence[str], options: argparse.Namespace, step: Step) -> list[Any]:
    """For each memory budget what is held, and the mean latency over these subnets."""
    supernet, x = servable.supernet, inputs(servable, CURVE_BATCH, options.seed)
    cache, points, held = ExecutableCache(0), [], []
    for name in names:
        cache.add(name, supernet.actuate(supernet.space.parse(name)))
    shared = [cache.get(name) for name in names]
    for budget in BUDGETS:
        cache.budget = Config(memory_budget=budget).memory_budget_bytes(supernet.nbytes)
        cache.fill()
        held.append(cache.held)
        points.append({"budget": budget, "held": len(cache.held), "held_bytes": cache.nbytes})
    cache.budget = math.inf
    cache.fill()
    runs = {f"{name} shared": partial(run, x) for name, run in zip(names, shared, strict=True)}
    runs |= {f"{name} packed": partial(cache.get(name), x) for name in names}
    medians_ms = interleaved(runs, options.rounds, CURVE_SECONDS, step, CLOCKS[options.clock])
    for point, packed in zip(points, held, strict=True):
        latencies_ms = [medians_ms[f"{name} {'packed' if name in packed else 'shared'}"] for name in names]
        point["mean_ms"] = round(statistics.fmean(latencies_ms), 4)
    return points


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    servable = load_servable(options.profile)
    servable.supernet.to(torch.device("cpu"))
    found = slackfit.load_choices(options.profile)
    choices = [choice for choice in found if choice.frontier and choice.ensemble is None]
    names = [choice.name for choice in choices]
    ranked = [choice.name for choice in sorted(choices, key=lambda each: each.accuracy)]
    three = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    picked = ranked if options.subnets == "all" else list(dict.fromkeys(three))
    with tqdm(total=options.rounds * (1 + len(picked) * len(options.batches)), disable=None, leave=False) as bar:
        curve = budget_curve(servable, names, options, bar.update)
        for point, growth in zip(curve, resident_growth(options.profile, names, BUDGETS, options.seed), strict=True):
            point["resident_growth_bytes"] = growth
        times, default = switching(servable, names, options.seed)
        cache = by_default(servable.supernet, names)
        compared = [compare(servable, name, cache, options, bar.update) for name in picked]
    stored = memory(servable, ranked)
    return {
        "rows": [row for rows, _ in compared for row in rows],
        **times,
        "zoo_memory_ratio": stored["supernet_to_zoo"],
        "memory": {**stored, **default, "subnets": [sizes for _, sizes in compared]},
        "budget_curve": curve,
    }


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows below their names, aligned."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines) + "\n"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", type=Path, default=Path("profiles/cifar10"), help="folder of the servable (default: %(default)s)")
    add("--subnets", choices=("three", "all"), default="three", help="three of the frontier, or all of it")
    add("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="batch sizes (default: 1 8 32)")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="what is measured (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of each (default: %(default)s)")
    add("--rounds", type=int, default=40, help="how often each is timed, at most (default: %(default)s)")
    add("--seconds", type=float, default=8.0, help="after so long no more rounds for a row (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the inputs and of the order of switching (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.threads, options.rounds, *options.batches) < 1:
        parser.error("--threads, --rounds and --batches must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse_arguments(arguments)
    if missing := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        sys.exit(f"bench_engine.py: {' and '.join(missing)} missing; pip install -r requirements-dev.txt installs them")
    torch.set_num_threads(options.threads)
    try:
        document = measure(options)
    except (slackfit.ProfileError, SupernetError, CannotFuseError) as error:
        sys.exit(f"bench_engine.py: {error}")
    for rows in (document["rows"], document["memory"]["subnets"], document["budget_curve"]):
        print(table(rows))
    facts = {"machine": platform.platform(), "torch": torch.__version__, "onnxruntime": version("onnxruntime")}
    print(json.dumps({**document, **facts, "threads": options.threads, "clock": options.clock, "seed": options.seed}))


if __name__ == "__main__":
    main()
