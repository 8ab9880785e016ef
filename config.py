"""Everything a server can be told: the settings, what they may be, the command line and the file that set them.

A setting has one name everywhere: ``max_queue`` here, ``--max-queue`` as a flag, ``max_queue`` or ``max-queue`` in a
TOML file. What the command line says wins over the file, and the file over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slackfit


class ConfigError(ValueError):
    """Settings that cannot be; each of ``problems`` names one, and what is allowed."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a server; complete and checked before a socket or a device is touched."""

    profile: Path = Path(__file__).parent / "profiles" / "cifar10"
    table_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "float32"
    policy: str = "clearfit"
    workers: int = 1
    threads: int = 0
    memory_budget: str = "3x"
    margin: float = 0.3
    correction: bool = True
    max_queue: int = 1000
    max_queue_bytes: int = 256 * 1024 * 1024
    max_in_flight: int = 256
    default_slo_ms: float = 100.0
    max_slo_ms: float = 60_000.0
    api_key_file: Path | None = None
    open_metrics: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    allow_origin: str = ""
    max_connections: int = 1000
    max_header_bytes: int = 8192
    max_upload_bytes: int = 256 * 1024 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    max_body_bytes: int = 16 * 1024 * 1024
    max_pixels: int = 25_000_000
    autoprofile: bool = True
    drain_timeout_s: float = 30.0
    hang_timeout_s: float = 5.0
    summary_s: float = 60.0

    def __post_init__(self) -> None:
        allowed = {
            "port": (0, 65535), "workers": (1, 64), "threads": (0, 1024), "margin": (0, 10),
            "max_queue": (1, 1_000_000), "max_queue_bytes": (1, 2**40), "max_in_flight": (1, 1_000_000),
            "max_slo_ms": (1, 3_600_000), "default_slo_ms": (0.1, self.max_slo_ms),
            "max_connections": (1, 1_000_000), "max_header_bytes": (256, 2**20), "max_upload_bytes": (1, 2**40),
            "header_timeout_s": (0.01, 3600), "body_timeout_s": (0.01, 3600), "idle_timeout_s": (0.01, 86_400),
            "max_body_bytes": (1, 2**30), "max_pixels": (1, 2**30), "drain_timeout_s": (0, 3600),
            "hang_timeout_s": (0.01, 3600),
            "summary_s": (0, 86_400),
        }  # fmt: skip
        problems = [
            f"{name} must be between {low:g} and {high:g}, not {getattr(self, name):g}"
            for name, (low, high) in allowed.items()
            if not low <= getattr(self, name) <= high
        ]
        if self.dtype not in slackfit.DTYPES:
            problems.append(f"dtype must be {' or '.join(slackfit.DTYPES)}, not '{self.dtype!s:.60}'")
        for parse in (lambda: self.memory_budget_bytes(1), lambda: self.origins):
            try:
                parse()
            except ConfigError as error:
                problems += error.problems
        for name, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
            if getattr(self, name) is None and getattr(self, other) is not None:
                problems.append(f"{name} must be given as well where {other} is")
        if problems:
            raise ConfigError(*problems)

    @property
    def threads_per_worker(self) -> int:
        """CPU threads of a worker: those asked for, or all cores but the one that serves HTTP, shared fairly."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, (cores - 1) // self.workers)

    @property
    def origins(self) -> frozenset[str]:
        """The origins in ``allow_origin``, in small letters as browsers send them."""
        found = [each.strip().lower() for each in self.allow_origin.split(",") if each.strip()]
        for each in found:
            if each != "*" and re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?", each) is None:
                examples = "origins such as https://example.com, with commas between, or *"
                raise ConfigError(f"allow_origin must be {examples}; not '{each:.60}'")
        return frozenset(found)

    def memory_budget_bytes(self, weights_bytes: int) -> float:
        """The memory budget for a supernet whose weights take so many bytes."""
        match = re.fullmatch(r"(\d{1,15})|(\d{1,6}(?:\.\d{1,6})?)x", self.memory_budget, re.ASCII)
        if match is None:
            raise ConfigError(
                f"memory_budget must be a number of bytes, or a multiple of the supernet's weights such as 2x, "
                f"not '{self.memory_budget:.60}'"
            )
        return float(match[1]) if match[1] else float(match[2]) * weights_bytes


# --------------------------------------------------------------------------------------------------- the file and flags


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asks for: to serve with these settings, or only to check them."""

    config: Config
    check: bool = False


def parse_arguments(arguments: Sequence[str] | None = None) -> Command:
    """The command that was given; exits with a message on bad usage and impossible settings.

    The exit code is 2, and with ``--check`` 1 after a line for each problem.
    """
    parser = _parser()
    namespace, unknown = parser.parse_known_args(arguments)
    given = vars(namespace)
    check, file = given.pop("check"), given.pop("config", None)
    try:
        if unknown:
            raise ConfigError(f"unknown argument {unknown[0]}{_nearest(unknown[0], _FLAGS)}")
        return Command(_config_from(file, given), check)
    except ConfigError as error:
        if not check:
            parser.error(str(error))
        for problem in error.problems:
            print(f"error: {problem}")
        sys.exit(1)


def _config_from(file: Path | None, given: dict[str, Any]) -> Config:
    """Defaults, overruled by the file's settings, overruled by the flags given; ConfigError has all that is wrong."""
    problems: list[str] = []
    settings = {} if file is None else read_settings(file, problems)
    try:
        config = Config(**(settings | given))
    except ConfigError as error:
        from_file = settings.keys() - given.keys()
        problems += [f"{file}: {each}" if each.split()[0] in from_file else each for each in error.problems]
    if problems:
        raise ConfigError(*problems)
    return config


def read_settings(file: Path, problems: list[str]) -> dict[str, Any]:
    """The settings of a TOML file that can be read; what cannot is added to ``problems``. Paths are relative to it."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{file}: cannot be read: {error.strerror}")
        return {}
    except ValueError as error:
        problems.append(f"{file}: not TOML: {error}")
        return {}
    fields = {field.name: field for field in dataclasses.fields(Config)}
    settings: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in fields:
            problems.append(f"{file}: unknown key '{key}'{_nearest(name, fields)}")
        elif name in settings:
            problems.append(f"{file}: {key} is there twice, with - and with _")
        elif wrong := _wrong_type(fields[name], value):
            problems.append(f"{file}: {key} must be {wrong}, not {_toml_kind(value)}")
        else:
            settings[name] = file.parent / value if _is_path(fields[name]) else value
    return settings


def _wrong_type(field: dataclasses.Field[Any], value: object) -> str:
    """What the value should be; empty if it is."""
    if isinstance(field.default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(field.default, int):
        return "" if type(value) is int else "a whole number"
    if isinstance(field.default, float):
        return "" if type(value) in (int, float) else "a number"
    return "" if isinstance(value, str) else "a string"


def _is_path(field: dataclasses.Field[Any]) -> bool:
    return field.type in ("Path", "Path | None")


def _toml_kind(value: object) -> str:
    kinds = {bool: "true or false", dict: "a table", list: "an array", str: "a string"}
    return kinds.get(type(value), str(value))


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like this one, or at all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


EPILOG = """\
policies:
{policies}

examples:
  superserve                                       serve the bundled CIFAR-10 supernet on 127.0.0.1:8000
  superserve --profile profiles/digits --port 9000 serve another profile
  superserve --config /etc/superserve.toml --check say what would keep a server from starting, and exit with 1 or 0
  superserve --policy fixed:largest                always the most accurate single subnet, for comparison
  curl --data-binary @examples/cat.jpg 'http://127.0.0.1:8000/predict?slo_ms=50'

In a checkout, python superserve.py is the same command. docs/operations.md tells when to change which option.
"""


def _parser() -> argparse.ArgumentParser:
    policies = "\n".join(f"  {name:<18} {text}" for name, text in slackfit.POLICIES.items())
    parser = argparse.ArgumentParser(
        prog="superserve",
        description="Serve a supernet over HTTP: every answer by its deadline, as accurate as the moment allows.",
        epilog=EPILOG.format(policies=policies),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="TOML file of settings named as these flags, without the dashes in front; flags win over it",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", default=False,
        help="check settings, profile, policy, device and latency table, print a line for each finding, and exit: "
        "with 1 if a server could not start, else with 0",
    )  # fmt: skip
    for field in dataclasses.fields(Config):
        _add_flag(parser, field)
    return parser


_FLAGS = ["--config", "--check", *("--" + field.name.replace("_", "-") for field in dataclasses.fields(Config))]


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    flag, text = "--" + field.name.replace("_", "-"), _HELP[field.name]
    if isinstance(field.default, bool):
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag, action=action, help=f"{text} (default: {'yes' if field.default else 'no'})")
        return
    kind = Path if _is_path(field) else type(field.default)
    default: Any = "none" if field.default in (None, "") else field.default
    shown = _relative(default) if isinstance(default, Path) else default
    parser.add_argument(flag, type=kind, help=f"{text} (default: {shown})", metavar="X")


_HELP = {
    "profile": "folder of the servable: supernet.json, weights, statistics, accuracies, latency tables",
    "table_dir": "folder where latency tables that the server measures are kept; without it, the profile's",
    "host": "address to listen on",
    "port": "port to listen on; 0 takes a free one",
    "device": "auto, cpu, cuda or cuda:N; auto takes a GPU when there is one",
    "dtype": f"numbers to compute with: {', '.join(slackfit.DTYPES)}; accuracies must have been measured with them",
    "policy": "how a subnet and a batch size are chosen; see below",
    "workers": "batches that run at the same time: CUDA streams, or thread groups on a CPU",
    "threads": "CPU threads per worker; 0: all cores but one, shared between the workers",
    "memory_budget": "memory for subnets held ready to run fastest, beside the shared weights: bytes, or a multiple of "
    "the supernet's weights such as 2x; 0 holds none",
    "margin": "plan with latencies longer by this fraction than measured, for what cannot be foreseen",
    "correction": "follow how much longer batches take at the moment, rather than believe the latency table",
    "max_queue": "waiting queries beyond which new ones get 429",
    "max_queue_bytes": "bytes that the inputs of waiting queries may take; beyond it, new ones get 429",
    "max_in_flight": "unanswered queries of one /stream connection beyond which its new ones get 429",
    "default_slo_ms": "SLO of requests that state none, in milliseconds",
    "max_slo_ms": "longest SLO that a request may state, in milliseconds",
    "api_key_file": "file of API keys, one a line; with it, all requests need one but those for health and the page's "
    "files",
    "open_metrics": "answer /metrics without a key",
    "tls_cert": "PEM file of the certificate, and those that vouch for it; with it, HTTPS is spoken",
    "tls_key": "PEM file of the certificate's private key",
    "allow_origin": "origins, with commas between, whose pages may use this server from a browser; * allows all",
    "max_connections": "open connections beyond which new ones get 503 and are closed",
    "max_header_bytes": "longest request line and longest header",
    "max_upload_bytes": "bytes of request bodies that are held at a time, all together; beyond it, 503",
    "header_timeout_s": "seconds that a request's head may take to arrive, and a TLS handshake",
    "body_timeout_s": "seconds that a body may take to arrive, and a client may take to read what it was sent",
    "idle_timeout_s": "seconds after which a connection without a request is closed",
    "max_body_bytes": "largest request body",
    "max_pixels": "most pixels of images that are decoded for one request",
    "autoprofile": "measure latencies at the start when no stored table fits this device, rather than fail",
    "drain_timeout_s": "seconds that queued queries get to finish after SIGTERM or Ctrl-C",
    "hang_timeout_s": "seconds after which a running batch counts as hung, but never less than ten times what was "
    "planned for it",
    "summary_s": "seconds between summaries in the log; 0: none",
}


def _relative(path: Path) -> str:
    here = Path(__file__).parent
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
