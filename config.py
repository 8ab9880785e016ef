"""Everything a server can be told: the settings, what they may be, and the command line that sets them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import slackfit


class ConfigError(ValueError):
    """A setting that cannot be; names it and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a server; complete and checked before a socket or a device is touched."""

    profile: Path = Path(__file__).parent / "profiles" / "cifar10"
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    policy: str = "halfslo"
    workers: int = 1
    threads: int = 0
    memory_budget: str = "3x"
    margin: float = 0.3
    correction: bool = True
    max_queue: int = 1000
    default_slo_ms: float = 100.0
    max_slo_ms: float = 60_000.0
    max_body_bytes: int = 16 * 1024 * 1024
    max_pixels: int = 25_000_000
    autoprofile: bool = True
    drain_timeout_s: float = 30.0
    summary_s: float = 60.0

    def __post_init__(self) -> None:
        allowed = {
            "port": (0, 65535), "workers": (1, 64), "threads": (0, 1024), "margin": (0, 10),
            "max_queue": (1, 1_000_000), "max_slo_ms": (1, 3_600_000), "default_slo_ms": (0.1, self.max_slo_ms),
            "max_body_bytes": (1, 2**30), "max_pixels": (1, 2**30), "drain_timeout_s": (0, 3600),
            "summary_s": (0, 86_400),
        }  # fmt: skip
        for name, (low, high) in allowed.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be between {low:g} and {high:g}, not {getattr(self, name):g}")
        self.memory_budget_bytes(1)

    @property
    def threads_per_worker(self) -> int:
        """CPU threads of a worker: those asked for, or all cores but the one that serves HTTP, shared fairly."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, (cores - 1) // self.workers)

    def memory_budget_bytes(self, weights_bytes: int) -> float:
        """The memory budget for a supernet whose weights take so many bytes."""
        match = re.fullmatch(r"(\d{1,15})|(\d{1,6}(?:\.\d{1,6})?)x", self.memory_budget, re.ASCII)
        if match is None:
            raise ConfigError(
                f"memory_budget must be a number of bytes, or a multiple of the supernet's weights such as 2x, "
                f"not '{self.memory_budget:.60}'"
            )
        return float(match[1]) if match[1] else float(match[2]) * weights_bytes


EPILOG = """\
policies:
{policies}

examples:
  superserve.py                                        serve the bundled CIFAR-10 supernet on 127.0.0.1:8000
  superserve.py --profile profiles/digits --port 9000  serve another profile
  superserve.py --policy fixed:largest                 always the most accurate subnet, for comparison
  curl --data-binary @examples/cat.jpg 'http://127.0.0.1:8000/predict?slo_ms=50'
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that the command line asks for; exits with a message on bad usage."""
    default = Config()
    policies = "\n".join(f"  {name:<18} {text}" for name, text in slackfit.POLICIES.items())
    parser = argparse.ArgumentParser(
        prog="superserve.py",
        description="Serve a supernet over HTTP: every answer by its deadline, as accurate as the moment allows.",
        epilog=EPILOG.format(policies=policies),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        value = getattr(default, field.name)
        flag = "--" + field.name.replace("_", "-")
        if value is True:
            negated = "--no-" + field.name.replace("_", "-")
            parser.add_argument(negated, dest=field.name, action="store_false", help=_HELP[field.name])
        else:
            shown = _relative(value) if isinstance(value, Path) else value
            text = f"{_HELP[field.name]} (default: {shown})"
            parser.add_argument(
                flag, type=type(value) if value is not None else str, default=value, help=text, metavar="X"
            )
    try:
        return Config(**vars(parser.parse_args(arguments)))
    except ConfigError as error:
        parser.error(str(error))


_HELP = {
    "profile": "folder of the servable: supernet.json, weights, statistics, accuracies, latency tables",
    "host": "address to listen on",
    "port": "port to listen on; 0 takes a free one",
    "device": "auto, cpu, cuda or cuda:N; auto takes a GPU when there is one",
    "policy": "how a subnet and a batch size are chosen; see below",
    "workers": "batches that run at the same time: CUDA streams, or thread groups on a CPU",
    "threads": "CPU threads per worker; 0: all cores but one, shared between the workers",
    "memory_budget": "memory for subnets held ready to run fastest, beside the shared weights: bytes, or a multiple of "
    "the supernet's weights such as 2x; 0 holds none",
    "margin": "plan with latencies longer by this fraction than measured, for what cannot be foreseen",
    "correction": "believe the latency table, rather than follow how much longer batches take at the moment",
    "max_queue": "waiting queries beyond which new ones get 429",
    "default_slo_ms": "SLO of requests that state none, in milliseconds",
    "max_slo_ms": "longest SLO that a request may state, in milliseconds",
    "max_body_bytes": "largest request body",
    "max_pixels": "largest image, in pixels, that is decoded",
    "autoprofile": "fail, rather than measure latencies, when no stored table fits this device",
    "drain_timeout_s": "seconds that queued queries get to finish after SIGTERM or Ctrl-C",
    "summary_s": "seconds between summaries in the log; 0: none",
}


def _relative(path: Path) -> str:
    here = Path(__file__).parent
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
