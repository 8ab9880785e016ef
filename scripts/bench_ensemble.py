"""Measure an ensemble against its members: accuracy on the test images, and latency against the batch size.

Runs in the engine as the server would: each member alone, the ensemble parallel and serial, and an ensemble of the
largest member with itself, which shows what running at the same time brings where both take equally long. All run at
all batch sizes once a round, in turn, so that a slow moment of the machine falls on all alike; the first round warms
up. A latency is the median from submitting a batch to having its result on the host. Members are computed with
--threads threads each; where that leaves no core for another, parallel cannot be faster.

Accuracies are those of the engine's answers for the test images. Members, combination and weights are those of the most
accurate ensemble of choices.json, unless --members names others, which are then averaged. The last line of stdout is
JSON; --plot draws it.

    python scripts/bench_ensemble.py --profile profiles/cifar10 --data ../shared/data/cifar10_jpeg.npz
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
from config import Config
from engine import Engine, EngineError, measure_latencies
from ensembles import MODES, forced
from members import subnet_of
from profiletable import Ensemble
from scripts import datasets
from scripts.provenance import provenance
from servable import Servable, load_servable
from supernet import SupernetError

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TESTED_AT_ONCE = 64  # images

Medians = Mapping[str, Sequence[float]]  # milliseconds by batch size, per name that the engine runs


def pick(choices: Sequence[slackfit.Choice], members: Sequence[str] | None) -> Ensemble:
    """The ensemble to measure; raises ProfileError where there is none, or no such member."""
    if members is None:
        known = [choice for choice in choices if choice.ensemble]
        if not known:
            raise slackfit.ProfileError("there is no ensemble in choices.json; name --members")
        best = max(known, key=lambda choice: choice.accuracy).ensemble
        assert best is not None, "chosen for having one"
        return best
    names = [choice.name for choice in choices if choice.ensemble is None]
    for subnet in map(subnet_of, members):
        if subnet not in names:
            raise slackfit.ProfileError(f"no subnet '{subnet}' in choices.json: there are {', '.join(names)}")
    share = 1 / len(members)
    ensemble = Ensemble(members=tuple(members), combination="mean", weights=(share,) * len(members))
    listed = [choice.ensemble for choice in choices if choice.ensemble and choice.name == ensemble.name]
    return listed[0] if listed else ensemble


def twice(ensemble: Ensemble) -> Ensemble:
    """The last member, which is the largest, with itself."""
    return Ensemble(members=ensemble.members[-1:] * 2, combination="mean", weights=(0.5, 0.5))


def start(servable: Servable, ensembles: Sequence[Ensemble], device: str, threads: int) -> Engine:
    """An engine with one worker that holds what the server's would by default."""
    budget = Config().memory_budget_bytes(servable.supernet.nbytes)
    engine = Engine(servable, device, threads=threads, memory_budget=budget, ensembles=ensembles)
    members = [subnet_of(member) for ensemble in ensembles for member in ensemble.members]
    asyncio.run(engine.prepare([*dict.fromkeys(members), *(ensemble.name for ensemble in ensembles)]))
    return engine


async def accuracy(engine: Engine, name: str, split: datasets.Split) -> float:
    """Part of the images that the engine's answers classify correctly."""
    right = 0
    for first in tqdm(range(0, len(split), TESTED_AT_ONCE), desc=f"test {name:.40}", disable=None, leave=False):
        images = list(split.images[first : first + TESTED_AT_ONCE])
        outputs = await engine.run(name, images)
        right += int((outputs.probabilities.argmax(1) == split.labels[first : first + TESTED_AT_ONCE]).sum())
    return round(right / len(split), 4)


def accuracies(engine: Engine, ensemble: Ensemble, split: datasets.Split) -> dict[str, Any]:
    """Of members and ensemble, and by how many points it is better than the best of them."""
    found = {name: asyncio.run(accuracy(engine, name, split)) for name in (*ensemble.members, ensemble.name)}
    together = found.pop(ensemble.name)
    gain = round(100 * (together - max(found.values())), 2)
    return {"members": found, "ensemble": together, "gain_points": gain, "images": len(split)}


def medians_ms(engine: Engine, names: Sequence[str], batches: Sequence[int], rounds: int) -> Medians:
    """Latencies of all, measured in turn."""
    with tqdm(total=(rounds + 1) * len(names) * len(batches), unit="batch", disable=None, leave=False) as bar:
        samples = asyncio.run(measure_latencies(engine, names, batches, rounds, bar.update))
    return {name: [round(statistics.median(each) * 1e3, 4) for each in sizes] for name, sizes in samples.items()}


def rows_of(ensemble: Ensemble, medians: Medians, batches: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each batch size: members, both modes, and the ratios."""
    rows = []
    for index, batch in enumerate(batches):
        members = {name: medians[name][index] for name in ensemble.members}
        parallel, serial = (medians[forced(ensemble.name, mode)][index] for mode in MODES)
        rows.append(
            {
                "batch": batch, "members_ms": members, "parallel_ms": parallel, "serial_ms": serial,
                "serial_to_parallel": round(serial / parallel, 3),
                "parallel_to_slowest": round(parallel / max(members.values()), 3),
            }
        )  # fmt: skip
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    servable = load_servable(options.profile)
    ensemble = pick(slackfit.load_choices(options.profile), options.members)
    data, equal = datasets.load(options.data, servable.input.height), twice(ensemble)
    engine = start(servable, (ensemble, equal), options.device, options.threads)
    runs = [forced(each.name, mode) for each in (ensemble, equal) for mode in MODES]
    medians = medians_ms(engine, [*ensemble.members, *runs], options.batches, options.rounds)
    document = {
        "ensemble": asdict(ensemble),
        "accuracy": accuracies(engine, ensemble, data.test),
        "rows": rows_of(ensemble, medians, options.batches),
        "two_equal_members": rows_of(equal, medians, options.batches),
        "device": asdict(engine.facts),
        "rounds": options.rounds,
    }
    engine.close()
    facts = provenance()
    return {**document, **facts, "versions": {**facts["versions"], "torch": torch.__version__}}


def report(document: Mapping[str, Any]) -> None:
    """Print the document for people."""
    found = document["accuracy"]
    for name, each in found["members"].items():
        print(f"{name}: {each:.4f} of {found['images']} test images")
    print(f"together: {found['ensemble']:.4f}, {found['gain_points']:+.2f} points over the best member")
    for title, key in (("the ensemble", "rows"), ("two equal members", "two_equal_members")):
        print(f"\n{title}\n{'batch':>6}{'slowest, ms':>13}{'parallel':>10}{'serial':>10}{'to slowest':>12}{'gain':>7}")
        for row in document[key]:
            slowest, parallel, serial = max(row["members_ms"].values()), row["parallel_ms"], row["serial_ms"]
            ratios = f"{row['parallel_to_slowest']:>12.2f}{row['serial_to_parallel']:>7.2f}"
            print(f"{row['batch']:>6}{slowest:>13.2f}{parallel:>10.2f}{serial:>10.2f}{ratios}")


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw latencies and ratios against the batch size."""
    import matplotlib
    from matplotlib.figure import Figure

    from scripts.plot_replay import GREY, STYLE

    rows = document["rows"]
    batches = [row["batch"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in rows[0]["members_ms"]:
            left.plot(batches, [row["members_ms"][name] for row in rows], color=GREY, marker=".", label=name)
        for mode, colour in (("parallel", "#0072b2"), ("serial", "#d55e00")):
            left.plot(batches, [row[f"{mode}_ms"] for row in rows], color=colour, marker="o", label=mode)
        right.plot(batches, [row["serial_to_parallel"] for row in rows], marker="o", label="serial / parallel")
        right.plot(batches, [row["parallel_to_slowest"] for row in rows], marker="o", label="parallel / slowest member")
        equal = document["two_equal_members"]
        gains = [row["serial_to_parallel"] for row in equal]
        right.plot(batches, gains, marker=".", label="two equal members: serial / parallel")
        for panel, title in ((left, "milliseconds a batch, median"), (right, "ratios")):
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, [str(batch) for batch in batches])
            panel.set_xlabel("batch size")
            panel.set_title(title, fontsize=9)
            panel.legend(fontsize=7)
        left.set_yscale("log")
        figure.savefig(path, dpi=130)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", type=Path, default=Path("profiles/cifar10"), help="folder of the servable (default: %(default)s)")
    add("--data", required=True, help="the data it was trained on; see train.py")
    add("--members", nargs="+", metavar="NAME", help="subnets of choices.json, the largest last")
    add("--batches", type=int, nargs="+", default=list(BATCHES), metavar="N", help="batch sizes (default: 1 to 256)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=int, default=1, help="CPU threads of each member (default: %(default)s)")
    add("--rounds", type=int, default=15, help="how often each is timed (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="draw latencies and ratios")
    options = parser.parse_args(arguments)
    if min(options.threads, options.rounds, *options.batches) < 1:
        parser.error("--threads, --rounds and --batches must be at least 1")
    if options.members and not 1 < len(set(options.members)) == len(options.members):
        parser.error("--members must be at least two different subnets")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    options = parse_arguments(arguments)
    try:
        document = measure(options)
    except (slackfit.ProfileError, SupernetError, EngineError, datasets.DatasetError) as error:
        sys.exit(f"bench_ensemble.py: {error}")
    report(document)
    if options.plot is not None:
        plot(document, options.plot)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
