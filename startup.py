"""What has to hold before a server can serve: choices with statistics, a policy that exists, a device, a latency table.

``SuperServe`` raises the first thing that is wrong; ``check`` finds all of them, for ``superserve --check``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import slackfit
from config import Config
from engine import Engine, EngineError, measure_latencies
from profiletable import refuse_synthetic
from servable import Servable, load_servable
from slackfit import Choice, Device, DeviceMismatch, Latencies, PolicyError, ProfileError, ProfileTable
from supernet import SupernetError

PROFILED_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


def check_policy(spec: str, choices: Sequence[Choice], workers: int) -> None:
    """Raise PolicyError for a policy that does not exist, before minutes are spent on measuring a table for it."""
    # Any latencies do that let no choice dominate another; of equally accurate ones, not the one that is asked for.
    frontier = [choice for choice in choices if choice.frontier]
    frontier.sort(key=lambda choice: (choice.accuracy, f"fixed:{choice.name}" != spec))
    latencies = {}
    for rank, choice in enumerate(frontier, start=1):
        latencies[choice.name] = Latencies(p50_s=(rank / 1e3,), p99_s=(rank / 1e3,))
    slackfit.make_policy(spec, slackfit.build_table(choices, (1,), latencies), workers)


def check_statistics(folder: Path, choices: Sequence[Choice], servable: Servable) -> None:
    """Raise ProfileError for a choice that cannot run, as it has no batch-norm statistics."""
    calibrated = {subnet.name for subnet in servable.supernet.statistics}
    for choice in choices:
        if choice.frontier and choice.name not in calibrated:
            raise ProfileError(f"{folder}/choices.json: {choice.name} has no statistics in norms.npz")


def start_engine(config: Config, servable: Servable) -> Engine:
    """The engine that the settings ask for; raises EngineError for a device that is not there."""
    return Engine(
        servable,
        config.device,
        workers=config.workers,
        threads=config.threads_per_worker,
        memory_budget=config.memory_budget_bytes(servable.supernet.nbytes),
    )


# ------------------------------------------------------------------------------------------------------- latency tables


@dataclass(frozen=True, slots=True)
class TableFile:
    """Where the latency table of one device is looked for: in the first folder, into which it is written, and on."""

    folders: tuple[Path, ...]
    choices: Sequence[Choice]
    device: Device

    @classmethod
    def of(cls, config: Config, choices: Sequence[Choice], engine: Engine) -> TableFile:
        """The file for an engine's device: in ``table_dir`` if there is one, and in the profile's folder."""
        folders = (config.profile,) if config.table_dir is None else (config.table_dir, config.profile)
        return cls(folders, choices, Device(**dataclasses.asdict(engine.facts)))

    @property
    def path(self) -> Path:
        """Where a table that was measured is stored."""
        return self.folders[0] / self.device.file_name

    def load(self) -> ProfileTable:
        """The stored table; DeviceMismatch if none fits this device, ProfileError if it is damaged."""
        missing = f"{self.path}: no latency table for this device"
        for folder in self.folders:
            path = folder / self.device.file_name
            if path.is_file():
                try:
                    return slackfit.load_latencies(path, self.choices, self.device)
                except DeviceMismatch as error:
                    missing = str(error)
        raise DeviceMismatch(missing)

    def store(self, latencies: Mapping[str, Latencies]) -> None:
        """Write what was measured at PROFILED_BATCH_SIZES; raises OSError where that cannot be."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        slackfit.save_latencies(self.path, self.device, PROFILED_BATCH_SIZES, latencies)


async def profile_latencies(engine: Engine, names: Sequence[str], rounds: int) -> dict[str, Latencies]:
    """Measure each subnet at PROFILED_BATCH_SIZES, with a progress bar on a terminal."""
    steps = (rounds + 1) * len(names) * len(PROFILED_BATCH_SIZES)
    with tqdm(total=steps, desc="profile", unit="batch", disable=None) as bar:
        samples = await measure_latencies(engine, names, PROFILED_BATCH_SIZES, rounds, bar.update)
    return {
        name: Latencies(
            p50_s=_rising(np.percentile(each, 50) for each in sizes),
            p99_s=_rising(np.percentile(each, 99) for each in sizes),
        )
        for name, sizes in samples.items()
    }


def _rising(latencies_s: Iterable[float]) -> tuple[float, ...]:
    """Latencies by batch size, freed of the dips that noise makes: a larger batch takes no less time."""
    return tuple(map(float, itertools.accumulate(latencies_s, max)))


# ------------------------------------------------------------------------------------------------------------- --check


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that ``check`` found: ``level`` is error (no server could start), warning or ok."""

    level: str
    text: str


def check(config: Config) -> list[Finding]:
    """All that is wrong with what a server would serve with these settings; no socket is opened, nothing is written."""
    findings: list[Finding] = []
    servable, choices, engine = None, None, None
    with _noting(findings):
        refuse_synthetic(config.profile)
        servable = load_servable(config.profile)
    with _noting(findings):
        choices = slackfit.load_choices(config.profile)
    if choices is not None:
        with _noting(findings):
            check_policy(config.policy, choices, config.workers)
        if servable is not None:
            with _noting(findings):
                check_statistics(config.profile, choices, servable)
    if servable is not None:
        with _noting(findings):
            engine = start_engine(config, servable)
    if engine is not None:
        engine.close()
        if choices is not None:
            findings += _check_table(config, TableFile.of(config, choices, engine))
    return findings


def _check_table(config: Config, file: TableFile) -> list[Finding]:
    findings: list[Finding] = []
    try:
        with _noting(findings):
            file.load()
            text = f"{file.device.name}, {file.device.threads} threads x {file.device.workers} workers"
            findings.append(Finding("ok", f"{config.profile} on {text}: a latency table fits"))
    except DeviceMismatch as error:
        if config.autoprofile:
            findings.append(Finding("warning", f"{error}; the start will measure one, which takes a while"))
        else:
            findings.append(Finding("error", f"{error}; start without --no-autoprofile to measure one"))
    return findings


@contextmanager
def _noting(findings: list[Finding]) -> Iterator[None]:
    """Note what would end the start as an error; a table of another device is left to the caller."""
    try:
        yield
    except DeviceMismatch:
        raise
    except (ProfileError, SupernetError, PolicyError, EngineError, OSError) as error:
        findings.append(Finding("error", str(error)))
