"""Make a text servable ready to serve: measure accuracies on labelled texts, and this device's latencies.

Every subnet that is looked at answers all texts, as the server would compute them. By every other text the frontier is
chosen, on the rest the accuracy is measured that the profile states. The texts must not have been trained on. Writes
choices.json and a latency table. (Layer norms need no calibration.)

DATA is a .jsonl file with an object a line: "text" or "input_ids" (and "attention_mask"), and "label", a class or its
number; or a .tsv file with a header that names the columns "text" (or "sentence") and "label".

    python scripts/profile_texts.py --profile profiles/sst2 --data dev.tsv
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import slackfit
import startup
from config import Config
from engine import Engine, measure_latencies
from scripts.profile_supernet import Candidate, confirmed, frontier, report, thinned, write_latencies
from servable import Servable, TokenSpec, load_servable
from supernet import Subnet, count_macs, count_parameters
from web.errors import ServeError
from web.texts import IDS, MASK, TEXT, TextForm

LEAST = 4  # texts: fewer tell no subnet from another


class DataError(ValueError):
    """Data that cannot be read; says which file, line and why."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Inputs, and the number of the class of each."""

    inputs: tuple[NDArray[np.int32], ...]
    labels: NDArray[np.int64]


def read_texts(path: Path, form: TextForm, classes: Sequence[str]) -> Texts:
    """The texts of a .jsonl or .tsv file; raises DataError."""
    known = {name: number for number, name in enumerate(classes)} | {str(n): n for n in range(len(classes))}
    inputs, labels = [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(_rows(path, file), start=1):
                inputs.append(_input(row, form, f"{path}: row {number}"))
                label = str(row.get("label"))
                if label not in known:
                    raise DataError(f"{path}: row {number}: label {label!r:.40}; known: {', '.join(classes)}")
                labels.append(known[label])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: {error}") from error
    if len(inputs) < LEAST:
        raise DataError(f"{path}: {len(inputs)} texts; at least {LEAST} are needed")
    return Texts(tuple(inputs), np.array(labels))


def _rows(path: Path, lines: Iterable[str]) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".tsv":
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {TEXT if name == "sentence" else name: value for name, value in row.items()}
        return
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: expected a .jsonl or a .tsv file")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number}: expected an object")
        yield row


def _input(row: Mapping[str, Any], form: TextForm, where: str) -> NDArray[np.int32]:
    try:
        if TEXT in row:
            return form.encode(row[TEXT])
        return form.check_lists({name: row[name] for name in (IDS, MASK) if name in row}, "the row")
    except ServeError as error:
        raise DataError(f"{where}: {error}") from error


def subnets_of(servable: Servable, most: int, seed: int) -> list[Subnet]:
    """All subnets, or the ends and a random choice of the others."""
    space = servable.supernet.space
    if len(space) <= most:
        return list(space)
    found, rng = dict.fromkeys((space.smallest, space.largest)), random.Random(seed)
    while len(found) < most:
        found[space.sample(rng)] = None
    return list(found)


async def hits(engine: Engine, name: str, texts: Texts, batch_size: int) -> NDArray[np.bool_]:
    """For each text, whether the subnet finds its class."""
    starts = range(0, len(texts.inputs), batch_size)
    rows = [(await engine.run(name, texts.inputs[start : start + batch_size])).probabilities for start in starts]
    right: NDArray[np.bool_] = np.concatenate(rows).argmax(1) == texts.labels
    return right


async def look_at(
    engine: Engine, servable: Servable, subnets: Sequence[Subnet], texts: Texts, batch_size: int
) -> list[Candidate]:
    """Accuracies and latencies of these subnets, the latter measured together."""
    names = [subnet.name for subnet in subnets]
    await engine.prepare(names)
    bar = tqdm(names, desc="accuracy", unit="subnet", disable=None)
    right = {name: await hits(engine, name, texts, batch_size) for name in bar}
    samples = await measure_latencies(engine, names, [batch_size], 9, lambda: None)
    found = []
    for subnet in subnets:
        extracted = servable.supernet.extract(subnet)
        found.append(
            Candidate(
                name=subnet.name,
                accuracy=float(right[subnet.name][::2].mean()),
                confirmed=float(right[subnet.name][1::2].mean()),
                latency_s=float(np.median(samples[subnet.name][0])),
                parameters=count_parameters(extracted),
                macs=count_macs(extracted, *servable.input.example()),
            )
        )
    return found


def write_choices(servable: Servable, found: Sequence[Candidate], samples: int, folder: Path, most: int) -> list[str]:
    """Choose the frontier and write choices.json; returns the frontier's names."""
    space = servable.supernet.space
    chosen = [candidate.name for candidate in confirmed(thinned(frontier(found), most))]
    names = dict.fromkeys([space.smallest.name, *chosen, space.largest.name])
    choices = [
        slackfit.Choice(
            name=each.name, kind="subnet", accuracy=round(each.confirmed, 4), accuracy_samples=samples // 2,
            test_accuracy=None, parameters=each.parameters, macs=each.macs, frontier=each.name in names,
        )
        for each in sorted(found, key=lambda each: each.macs)
    ]  # fmt: skip
    slackfit.save_choices(folder, choices)
    return list(names)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True, help="folder that import_checkpoint.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="labelled texts, .jsonl or .tsv")
    parser.add_argument("--candidates", type=int, default=60, help="subnets to look at (default: 60)")
    parser.add_argument("--most", type=int, default=14, help="most subnets on the frontier (default: 14)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts computed together (default: 16)")
    parser.add_argument("--rounds", type=int, default=60, help="measurements per subnet and batch size (default: 60)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, default=1, help="batches in flight while measuring, as in serving")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads per worker; 0: as the server chooses")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among too many subnets")
    options = parser.parse_args(arguments)
    for name in ("candidates", "most", "batch_size", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, choose, write, report; the last line printed is JSON."""
    options = parse_arguments(arguments)
    config = Config(profile=options.profile, workers=options.workers, threads=options.threads, device=options.device)
    try:
        servable = load_servable(options.profile)
        form = startup.input_form(config, servable)
        if not isinstance(servable.input, TokenSpec) or not isinstance(form, TextForm):
            raise DataError(f"{options.profile} takes images; scripts/profile_supernet.py measures those")
        texts = read_texts(options.data, form, servable.classes)
        engine = startup.start_engine(config, servable)
        subnets = subnets_of(servable, max(2, options.candidates), options.seed)
        found = asyncio.run(look_at(engine, servable, subnets, texts, options.batch_size))
        names = write_choices(servable, found, len(texts.inputs), options.profile, options.most)
        path = write_latencies(engine, names, options.profile, options.rounds)
        engine.close()
        print(json.dumps(report(options.profile, path, slackfit.Device(**asdict(engine.facts)))))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"profile_texts.py: {error}")


if __name__ == "__main__":
    main()
