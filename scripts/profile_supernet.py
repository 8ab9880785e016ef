"""Make a trained supernet servable: search the frontier, calibrate, measure accuracy and this device's latencies.

Random subnets first, then mutations of those on the accuracy/latency frontier (evolutionary search). Every subnet
looked at is calibrated, and its statistics and validation accuracy are kept. Validation images were set apart from the
training images and never trained on. By one half of them the frontier is chosen, on the other half the accuracy is
measured that the profile states: among many candidates, those are chosen that chance has favoured too. The test images
only report. Writes norms.npz, choices.json and a latency table; continues an interrupted search from search.jsonl.

With --dtype, what there is computes with other numbers than float32 from now on: the accuracy of all choices on the
frontier is measured anew, as the server computes them, on the same images, and so are the latencies.

With --ensembles, pairs and triples of the subnets on the frontier that extend it become choices too, in place of those
there were; with --ensembles-only, the subnets and their accuracies stay as they are (docs/ensembles.md).

    python scripts/profile_supernet.py --data digits --profile profiles/digits --candidates 60
    python scripts/profile_supernet.py --data ../shared/data/cifar10_jpeg.npz --profile profiles/cifar10
    python scripts/profile_supernet.py --data digits --profile profiles/digits --ensembles-only
    python scripts/profile_supernet.py --profile profiles/cifar10 --latency-only
    python scripts/profile_supernet.py --data cifar10_jpeg.npz --profile profiles/cifar10 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from config import Config
from engine import Engine, measure_latencies
from profiletable import Ensemble
from scripts import datasets
from scripts.ensemble_search import find_ensembles
from scripts.frontiers import Candidate, confirmed, frontier, thinned
from scripts.train import accuracy, calibration_batches, hits
from servable import InputSpec, Servable, load_servable, save_servable
from startup import PROFILED_BATCH_SIZES, profile_latencies
from supernet import Subnet, count_macs, count_parameters
from wholefile import write_text


class Search:
    """Evaluates subnets once each and remembers them, also across interruptions."""

    def __init__(
        self, servable: Servable, data: datasets.Dataset, engine: Engine, folder: Path, batch_size: int
    ) -> None:
        self.servable, self.data, self.engine, self.folder = servable, data, engine, folder
        self.batch_size = batch_size
        self._batches = calibration_batches(data, servable)
        self.found: dict[str, Candidate] = {}
        self._log = folder / "search.jsonl"
        if self._log.is_file():
            self._recall()

    def _recall(self) -> None:
        """Take up what an interrupted search found, as far as its statistics were saved."""
        supernet = self.servable.supernet
        lines = self._log.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # the last may be cut off
        write_text(self._log, "".join(whole))
        rows = [row for row in map(json.loads, whole) if row.keys() == Candidate.__dataclass_fields__.keys()]
        found = [Candidate(**row) for row in rows]
        self.found = {each.name: each for each in found if supernet.is_calibrated(supernet.space.parse(each.name))}

    def look_at(self, subnet: Subnet) -> Candidate:
        """Calibrate and measure a subnet, unless that was done before."""
        if subnet.name not in self.found:
            self.servable.supernet.calibrate(subnet, self._batches)
            extracted, spec = self.servable.supernet.extract(subnet), self.servable.input
            latency_s = self._latency_s(subnet.name)
            fast = self.engine.executables.get(subnet.name) if self.engine.executables else None
            right = hits(self.servable, subnet, self.data.validation, fast)
            candidate = Candidate(
                name=subnet.name,
                accuracy=float(right[::2].mean()),
                confirmed=float(right[1::2].mean()),
                latency_s=latency_s,
                parameters=count_parameters(extracted),
                macs=count_macs(extracted, (spec.channels, spec.height, spec.width)),
            )
            self.found[subnet.name] = candidate
            with self._log.open("a") as file:
                file.write(json.dumps(asdict(candidate)) + "\n")
            if len(self.found) % 10 == 0:
                save_servable(self.servable, self.folder)
        return self.found[subnet.name]

    def _latency_s(self, name: str) -> float:
        async def measured() -> Mapping[str, Sequence[Sequence[float]]]:
            await self.engine.prepare([name])
            return await measure_latencies(self.engine, [name], [self.batch_size], 7, lambda: None)

        return float(np.median(asyncio.run(measured())[name][0]))

    def run(self, candidates: int, seed: int) -> list[Candidate]:
        """Look at this many subnets: the ends, a third at random, the rest mutations of the frontier so far."""
        rng, space = random.Random(seed), self.servable.supernet.space
        candidates = min(candidates, len(space))
        with tqdm(total=candidates, desc="search", unit="subnet", disable=None, initial=len(self.found)) as bar:

            def look(subnet: Subnet) -> None:
                before = len(self.found)
                self.look_at(subnet)
                bar.update(len(self.found) - before)

            for subnet in (space.largest, space.smallest, *(space if candidates == len(space) else ())):
                look(subnet)
            while len(self.found) < candidates:
                look(self._next(rng, random_part=candidates // 3))
        save_servable(self.servable, self.folder)
        return self._timed_together()

    def _timed_together(self) -> list[Candidate]:
        """All that was found, latencies measured anew in common rounds: the search spans quiet and busy hours."""
        names = list(self.found)
        samples = asyncio.run(measure_latencies(self.engine, names, [self.batch_size], 9, lambda: None))
        return [replace(self.found[name], latency_s=float(np.median(samples[name][0]))) for name in names]

    def _next(self, rng: random.Random, random_part: int) -> Subnet:
        space = self.servable.supernet.space
        if len(self.found) < random_part:
            return space.sample(rng)
        parent = space.parse(rng.choice(frontier(list(self.found.values()))).name)
        return space.mutate(parent, rng, probability=0.35)


def write_choices(
    servable: Servable, data: datasets.Dataset, found: Sequence[Candidate], folder: Path, most: int
) -> list[str]:
    """Choose the frontier, report it on the test images, and write choices.json; returns the frontier's names."""
    chosen = [candidate.name for candidate in confirmed(thinned(frontier(found), most))]
    space = servable.supernet.space
    names = dict.fromkeys([space.smallest.name, *chosen, space.largest.name])
    choices = [
        slackfit.Choice(
            name=candidate.name,
            kind="subnet",
            accuracy=round(candidate.confirmed, 4),
            accuracy_samples=len(data.validation) // 2,
            test_accuracy=_test_accuracy(servable, candidate.name, data) if candidate.name in names else None,
            parameters=candidate.parameters,
            macs=candidate.macs,
            frontier=candidate.name in names,
        )
        for candidate in sorted(found, key=lambda each: each.macs)
    ]
    slackfit.save_choices(folder, choices)
    return list(names)


def _test_accuracy(servable: Servable, name: str, data: datasets.Dataset) -> float:
    return round(accuracy(servable, servable.supernet.space.parse(name), data.test), 4)


def write_accuracies(engine: Engine, data: datasets.Dataset, folder: Path) -> None:
    """Measure all choices that may answer as this engine computes them, and write that into choices.json."""
    choices, dtype = slackfit.load_choices(folder), engine.facts.dtype
    served = slackfit.served(choices)
    needed = [each.name for each in choices if each.name in served]
    confirming = datasets.Split(data.validation.images[1::2], data.validation.labels[1::2])
    measured = {}
    with tqdm(needed, desc=dtype, unit="choice", disable=None) as names:
        for name in names:
            accuracy, tested = (served_accuracy(engine, name, split) for split in (confirming, data.test))
            measured[name] = slackfit.InDtype(dtype=dtype, accuracy=accuracy, test_accuracy=tested)
    slackfit.save_choices(
        folder, [slackfit.measured_in(each, measured[each.name]) if each.name in measured else each for each in choices]
    )


def served_accuracy(engine: Engine, name: str, split: datasets.Split) -> float:
    """Part of the images that a subnet or ensemble classifies correctly, as the engine runs it."""
    largest = PROFILED_BATCH_SIZES[-1]

    async def right() -> int:
        await engine.prepare([name])
        count = 0
        for first in range(0, len(split), largest):
            batch = slice(first, first + largest)
            outputs = await engine.run(name, list(split.images[batch]))
            count += int((outputs.probabilities.argmax(1) == split.labels[batch]).sum())
        return count

    return round(asyncio.run(right()) / len(split), 4)


def write_latencies(engine: Engine, names: Sequence[str], folder: Path, rounds: int) -> Path:
    """Measure the frontier's latencies and write the table for this device."""
    device = slackfit.Device(**asdict(engine.facts))
    path = folder / device.file_name
    slackfit.save_latencies(path, device, PROFILED_BATCH_SIZES, asyncio.run(_measured(engine, names, rounds)))
    return path


async def _measured(engine: Engine, names: Sequence[str], rounds: int) -> dict[str, slackfit.Latencies]:
    await engine.prepare(names)
    await engine.warm_up(names, (1, 64), lambda: None)
    return await profile_latencies(engine, names, rounds)


def report(folder: Path, path: Path, device: slackfit.Device) -> dict[str, object]:
    """Print the frontier as a table; returns it for the closing JSON line."""
    choices = slackfit.load_choices(folder, device.dtype)
    table = slackfit.load_latencies(path, choices, device)
    print(f"\n{'subnet':<28}{'validation':>11}{'test':>8}{'MMACs':>8}  latency p99 in ms at batch 1, 16, 64")
    for entry in table.entries:
        choice, latency = entry.choice, [entry.latency_s[n] * 1e3 for n in (1, 16, 64)]
        test = "-" if choice.test_accuracy is None else f"{choice.test_accuracy:.4f}"
        times = "  ".join(f"{each:8.2f}" for each in latency)
        print(f"{entry.name:<28}{choice.accuracy:>11.4f}{test:>8}{choice.macs / 1e6:>8.1f}  {times}")
    return {"profile": str(folder), "table": path.name, "calibrated": len(choices), "entries": len(table.entries)}


def report_held(engine: Engine) -> dict[str, object]:
    """Print what the engine ran with; returns it for the closing JSON line."""
    held = engine.held
    counts = f"{len(held.subnets)} subnets, {len(held.pairs)} captured pairs of subnet and batch size"
    print(f"\nheld: {counts}, {held.nbytes / 2**20:.1f} MB")
    return {"subnets_held": len(held.subnets), "pairs_held": len(held.pairs), "held_bytes": held.nbytes}


def check_data(data: datasets.Dataset, servable: Servable) -> None:
    """Raise ValueError for data of another form than the network's input, or with more or fewer classes."""
    spec, shape = servable.input, data.validation.images.shape[1:]
    if shape != (spec.height, spec.width, spec.channels):
        raise ValueError(f"{data.name} has images of {'x'.join(map(str, shape))}, the network takes {spec}")
    if len(data.classes) != len(servable.classes):
        raise ValueError(f"{data.name} has {len(data.classes)} classes, the network {len(servable.classes)}")


def choose(options: argparse.Namespace, servable: Servable, engine: Engine) -> None:
    """Search for subnets, ensembles or both, or measure those there are in another dtype; write choices.json."""
    if not isinstance(servable.input, InputSpec):
        raise ValueError(f"{options.profile} takes texts; scripts/profile_texts.py measures those")
    data, folder = datasets.load(options.data, servable.input.height), options.profile
    check_data(data, servable)
    if options.dtype != "float32":
        write_accuracies(engine, data, folder)
    else:
        search_all(options, servable, data, engine)


def ensembles_of(folder: Path) -> list[Ensemble]:
    """All that are among the choices."""
    return [choice.ensemble for choice in slackfit.load_choices(folder) if choice.ensemble]


def search_all(options: argparse.Namespace, servable: Servable, data: datasets.Dataset, engine: Engine) -> None:
    """Search for subnets, ensembles or both, and write choices.json."""
    folder = options.profile
    if not options.ensembles_only:
        search = Search(servable, data, engine, folder, options.batch_size)
        write_choices(servable, data, search.run(options.candidates, options.seed), folder, options.most)
    if options.ensembles or options.ensembles_only:
        find_ensembles(engine, servable, data, folder, options.batch_size, options.lanes)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--data", help="the data it was trained on; see train.py")
    parser.add_argument("--candidates", type=int, default=180, help="subnets to look at (default: 180)")
    parser.add_argument("--most", type=int, default=14, help="most subnets on the frontier (default: 14)")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the search's latencies (default: 16)")
    parser.add_argument("--rounds", type=int, default=60, help="measurements per subnet and batch size (default: 60)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=slackfit.DTYPES, default="float32",
        help="measure what there is in these numbers (default: float32, in which all starts)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="batches in flight while measuring, as in serving")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads per worker; 0: as the server chooses")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument(
        "--lanes", type=int, default=0, metavar="N",
        help="choose ensembles as if N of their members ran at the same time; 1: one after another, so that they only "
        "extend the frontier upward; 0: as many as can (default: 0)",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ensembles", action="store_true", help="after the subnets, look for ensembles of them")
    what.add_argument("--ensembles-only", action="store_true", help="look for ensembles of the subnets there are")
    what.add_argument("--latency-only", action="store_true", help="only measure this device's latencies")
    options = parser.parse_args(arguments)
    if options.dtype != "float32" and (options.ensembles or options.ensembles_only):
        parser.error("ensembles are looked for in float32; --dtype measures those there are")
    if not options.latency_only and options.data is None:
        parser.error("--data is needed, except with --latency-only")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, calibrate, measure, write, report."""
    options = parse_arguments(arguments)
    threads = Config(workers=options.workers, threads=options.threads).threads_per_worker
    torch.set_num_threads(max(threads, os.cpu_count() or 1))  # of this thread, which computes accuracies
    try:
        servable = load_servable(options.profile, options.dtype)
        make_engine = partial(Engine, servable, options.device, workers=options.workers, threads=threads)
        if not options.latency_only:
            found = ensembles_of(options.profile) if options.dtype != "float32" else ()
            with closing(make_engine(ensembles=found)) as searching:  # holds all that it looks at
                choose(options, servable, searching)
        names = [each.name for each in slackfit.load_choices(options.profile, options.dtype) if each.frontier]
        # As the server runs them: with what its default budget holds.
        engine = make_engine(
            memory_budget=Config().memory_budget_bytes(servable.supernet.nbytes),
            ensembles=ensembles_of(options.profile),
        )
        path = write_latencies(engine, names, options.profile, options.rounds)
        document = report(options.profile, path, slackfit.Device(**asdict(engine.facts))) | report_held(engine)
        print(json.dumps(document))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"profile_supernet.py: {error}")


if __name__ == "__main__":
    main()
