"""What has to hold before a server can serve: choices with statistics, a policy that exists, a device, a latency table.

``SuperServe`` raises the first thing that is wrong; ``check`` finds all of them, for ``superserve --check``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import itertools
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from aiohttp import web
from PIL import Image
from tqdm import tqdm

import slackfit
from config import Config
from engine import Engine, EngineError, measure_latencies
from ensembles import MODES, forced
from logs import log_event
from members import is_mirrored, subnet_of
from profiletable import refuse_synthetic
from servable import InputSpec, Servable, load_servable
from slackfit import Choice, Device, DeviceMismatch, Latencies, PolicyError, ProfileError, ProfileTable
from supernet import IllegalSubnetError, Supernet, SupernetError
from web.access import Access, AccessError, is_loopback, load_keys, load_tls, readable_by_others
from web.inputs import ImageForm
from web.listen import ConnectionLimits, listening, room_for
from web.texts import TextForm
from web.tokenizer import FILES as TOKENIZER_FILES
from web.tokenizer import NO_PACKAGE, TokenizerError, find_tokenizer, load_tokenizer

PROFILED_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Garbage is looked for in these intervals, in all that is not frozen for so much of the time at most.
COLLECTED_EVERY_S, COLLECTING = 2.0, 0.00005


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
    """Raise ProfileError for a choice that cannot run: without batch-norm statistics, or mirroring what is no image."""
    for choice in (choice for choice in choices if choice.frontier):
        for name in choice.ensemble.members if choice.ensemble else (choice.name,):
            if not _is_calibrated(servable.supernet, subnet_of(name)):
                raise ProfileError(f"{folder}/choices.json: {subnet_of(name)} has no statistics in norms.npz")
            if is_mirrored(name) and not isinstance(servable.input, InputSpec):
                raise ProfileError(f"{folder}/choices.json: {name}: only images can be mirrored")


def _is_calibrated(supernet: Supernet, name: str) -> bool:
    try:
        subnet = supernet.space.parse(name)
        supernet.space.check(subnet)
    except IllegalSubnetError:
        return not supernet.operators.subnet_norms
    return supernet.is_calibrated(subnet)


def input_form(config: Config, servable: Servable) -> ImageForm | TextForm:
    """How requests become inputs of this network; raises SupernetError for a tokenizer file that cannot be used."""
    spec = servable.input
    if isinstance(spec, InputSpec):
        Image.init()  # loads what reads images; else the first odd one would do so, while others wait
        return ImageForm(spec, config.max_pixels)
    path = find_tokenizer(config.profile)
    missing = f"no {' or '.join(TOKENIZER_FILES)} lies beside the weights" if path is None else NO_PACKAGE
    try:
        tokenizer = None if path is None else load_tokenizer(path, spec.length, spec.vocabulary)
    except TokenizerError as error:
        raise SupernetError(str(error)) from error
    return TextForm(length=spec.length, vocabulary=spec.vocabulary, tokenizer=tokenizer, missing=missing)


def lacking(form: ImageForm | TextForm) -> list[str]:
    """What a text network is served without."""
    if isinstance(form, ImageForm) or form.tokenizer is not None:
        return []
    return [f"texts are not read, only token ids, as {form.missing}"]


def start_engine(config: Config, servable: Servable, choices: Sequence[Choice] = ()) -> Engine:
    """The engine that the settings ask for, with the ensembles among the choices.

    Raises EngineError for a device that is not there.
    """
    return Engine(
        servable,
        config.device,
        workers=config.workers,
        threads=config.threads_per_worker,
        memory_budget=config.memory_budget_bytes(servable.supernet.nbytes),
        ensembles=[choice.ensemble for choice in choices if choice.ensemble],
    )


def plan_ensembles(engine: Engine, table: ProfileTable) -> None:
    """Have the engine run each ensemble in the mode that was measured to be faster, by batch size."""
    for entry in table.entries:
        if entry.modes:
            engine.plan(entry.name, entry.modes)


def settle_garbage() -> None:
    """Once all is there that stays: collections look at none of it from now on, and come less often.

    64 queries under way make and free some thousands of objects, so that at Python's threshold of 700 a collection, in
    vain, would come several times for each such wave.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 5, 5)


async def collect_when_idle(clock: Callable[[], float], is_idle: Callable[[], bool]) -> None:
    """Look for garbage every so often while it holds nobody up; for ever.

    What a server that is hardly asked leaves would never come to the thresholds. Collecting all that is not frozen
    takes the longer the more connections there are: then it is seldom done, and else only what is new is looked at.
    """
    full_from_s = 0.0
    while True:
        await asyncio.sleep(COLLECTED_EVERY_S)
        if is_idle():
            began_s = clock()
            full = began_s >= full_from_s
            gc.collect(2 if full else 1)
            if full:
                full_from_s = began_s + (clock() - began_s) / COLLECTING


# ------------------------------------------------------------------------------------------------------------- the door


def load_access(config: Config) -> Access:
    """Who may ask what; raises AccessError for a file of keys that cannot be used."""
    keys = None if config.api_key_file is None else load_keys(config.api_key_file)
    return Access(keys=keys, open_metrics=config.open_metrics, origins=config.origins)


def load_certificate(config: Config) -> ssl.SSLContext | None:
    """With what HTTPS is spoken, if it is; raises AccessError for files that cannot be used."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return load_tls(config.tls_cert, config.tls_key)


def connection_limits(config: Config) -> ConnectionLimits:
    """What connections may take, fewer of them where file descriptors are short."""
    return ConnectionLimits(
        connections=room_for(config.max_connections),
        header_bytes=config.max_header_bytes,
        header_timeout_s=config.header_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
        stall_timeout_s=config.body_timeout_s,
    )


def exposures(config: Config, limits: ConnectionLimits) -> list[str]:
    """What lets more in than one might think, or less; of settings whose files can be read."""
    found = []
    if config.api_key_file is None and not is_loopback(config.host):
        found.append(f"whoever reaches {config.host} may use this server: there is no api_key_file")
    for name in ("api_key_file", "tls_key"):
        path = getattr(config, name)
        if path is not None and readable_by_others(path):
            found.append(f"{name} {path} can be read by all users of this machine")
    if limits.connections < config.max_connections:
        few, many = limits.connections, config.max_connections
        found.append(f"max_connections is {many}, but the limit of open files leaves room for {few}")
    return found


@asynccontextmanager
async def opened(config: Config, runner: web.AppRunner) -> AsyncIterator[str]:
    """Listen as the settings say while the block runs; gives the URL. Raises AccessError or OSError."""
    tls, limits = load_certificate(config), connection_limits(config)
    for exposure in exposures(config, limits):
        log_event("exposed", logging.WARNING, why=exposure)
    async with listening(runner, config.host, config.port, limits, tls) as url:
        log_event("listening", url=url)
        yield url


# ------------------------------------------------------------------------------------------------------- latency tables


@dataclass(frozen=True, slots=True)
class TableFile:
    """Where the latency table of one device is looked for: in the first folder, into which it is written, and on."""

    folders: tuple[Path, ...]
    choices: Sequence[Choice]
    device: Device

    @classmethod
    def of(cls, config: Config, choices: Sequence[Choice], engine: Engine) -> TableFile:
        """The file for an engine's device: in ``table_dir`` if there is one, and in the profile's folder.

        ``table_dir`` may hold the tables of several profiles, and of one that has changed since: each has a folder.
        """
        folders: tuple[Path, ...] = (config.profile,)
        if config.table_dir is not None:
            folders = (config.table_dir / _fingerprint(config.profile, choices), config.profile)
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
        if self.path.resolve().parent != self.path.parent.resolve():
            raise OSError(f"{self.path} is a link that leads out of its folder")
        slackfit.save_latencies(self.path, self.device, PROFILED_BATCH_SIZES, latencies)


def _fingerprint(profile: Path, choices: Sequence[Choice]) -> str:
    """A name for what latencies depend on: the architecture, and which subnets are on the frontier."""
    digest = hashlib.sha256((profile / "supernet.json").read_bytes())
    digest.update(json.dumps(sorted(choice.name for choice in choices if choice.frontier)).encode())
    return f"{profile.resolve().name}-{digest.hexdigest()[:12]}"


async def profile_latencies(engine: Engine, names: Sequence[str], rounds: int) -> dict[str, Latencies]:
    """Measure each choice at PROFILED_BATCH_SIZES, ensembles in both modes, with a progress bar on a terminal."""
    both = {name: [forced(name, mode) for mode in MODES] for name in names if name in engine.ensembles}
    runs = [run for name in names for run in both.get(name, [name])]
    steps = (rounds + 1) * len(runs) * len(PROFILED_BATCH_SIZES)
    with tqdm(total=steps, desc="profile", unit="batch", disable=None) as bar:
        samples = await measure_latencies(engine, runs, PROFILED_BATCH_SIZES, rounds, bar.update)
    measured = {
        run: Latencies(
            p50_s=_rising(np.percentile(each, 50) for each in sizes),
            p99_s=_rising(np.percentile(each, 99) for each in sizes),
        )
        for run, sizes in samples.items()
    }
    return {
        name: faster_of(*(measured[run] for run in both[name])) if name in both else measured[name] for name in names
    }


def faster_of(parallel: Latencies, serial: Latencies) -> Latencies:
    """The latencies of an ensemble that runs in the mode of the lower median at each batch size."""
    medians_s = list(zip(parallel.p50_s, serial.p50_s, strict=True))
    by_mode = [parallel if parallel_s <= serial_s else serial for parallel_s, serial_s in medians_s]
    return Latencies(
        p50_s=tuple(map(min, medians_s)),
        p99_s=_rising(latencies.p99_s[index] for index, latencies in enumerate(by_mode)),
        modes=tuple("parallel" if latencies is parallel else "serial" for latencies in by_mode),
        parallel_p50_s=parallel.p50_s,
        serial_p50_s=serial.p50_s,
    )


def _rising(latencies_s: Iterable[float]) -> tuple[float, ...]:
    """Latencies by batch size, freed of the dips that noise makes: a larger batch takes no less time."""
    return tuple(map(float, itertools.accumulate(latencies_s, max)))


# ------------------------------------------------------------------------------------------------------------- --check


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that ``check`` found: ``level`` is error (no server could start), warning or ok."""

    level: str
    text: str


def report(findings: Sequence[Finding]) -> int:
    """Print a line for each finding of ``--check``; the exit code."""
    for finding in findings:
        print(f"{finding.level}: {finding.text}")
    return int(any(finding.level == "error" for finding in findings))


def check(config: Config) -> list[Finding]:
    """All that is wrong with what a server would serve with these settings; no socket is opened, nothing is written."""
    findings: list[Finding] = []
    servable, choices, engine = None, None, None
    with _noting(findings):
        load_access(config)
        load_certificate(config)
        findings += [Finding("warning", each) for each in exposures(config, connection_limits(config))]
    with _noting(findings):
        refuse_synthetic(config.profile)
        servable = load_servable(config.profile, config.dtype)
        findings += [Finding("warning", each) for each in lacking(input_form(config, servable))]
    with _noting(findings):
        choices = slackfit.load_choices(config.profile, config.dtype)
    if choices is not None:
        with _noting(findings):
            check_policy(config.policy, choices, config.workers)
        if servable is not None:
            with _noting(findings):
                check_statistics(config.profile, choices, servable)
    if servable is not None:
        with _noting(findings):
            engine = start_engine(config, servable, choices or ())
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
    except (AccessError, ProfileError, SupernetError, PolicyError, EngineError, OSError) as error:
        findings.append(Finding("error", str(error)))
