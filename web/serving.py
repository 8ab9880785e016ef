"""What the Open Inference Protocol needs of the server behind it; ``SuperServe`` is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from web.inputs import ImageForm, Limits, Parameters
from web.statistics import Statistics
from web.texts import TextForm

Result = TypeVar("Result")


class Reply(Protocol):
    """The answer to one query; ``probabilities`` has one value per class."""

    @property
    def probabilities(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def subnet(self) -> str: ...  # noqa: D102
    @property
    def accuracy(self) -> float: ...  # noqa: D102
    @property
    def slo_s(self) -> float: ...  # noqa: D102
    @property
    def latency_s(self) -> float: ...  # noqa: D102
    @property
    def queue_s(self) -> float: ...  # noqa: D102
    @property
    def deadline_met(self) -> bool: ...  # noqa: D102
    @property
    def degraded(self) -> bool: ...  # noqa: D102


class Settings(Protocol):
    """The part of Config that the protocol tells of or keeps to."""

    @property
    def default_slo_ms(self) -> float: ...  # noqa: D102
    @property
    def max_slo_ms(self) -> float: ...  # noqa: D102
    @property
    def max_queue(self) -> int: ...  # noqa: D102
    @property
    def max_body_bytes(self) -> int: ...  # noqa: D102
    @property
    def max_pixels(self) -> int: ...  # noqa: D102
    @property
    def api_key_file(self) -> Path | None: ...  # noqa: D102
    @property
    def open_metrics(self) -> bool: ...  # noqa: D102


class Serving(Protocol):
    """One model that answers queries; ``limits`` and ``submit`` raise NotReady while it does not.

    ``aside`` does on a thread what would hold up the queries of others.
    """

    @property
    def clock(self) -> Callable[[], float]: ...  # noqa: D102
    @property
    def config(self) -> Settings: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def classes(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def form(self) -> ImageForm | TextForm: ...  # noqa: D102
    @property
    def statistics(self) -> Statistics: ...  # noqa: D102
    def limits(self) -> Limits: ...  # noqa: D102
    def turn_away(self, arrival_s: float, parameters: Parameters) -> None: ...  # noqa: D102
    async def submit(self, input: NDArray[Any], arrival_s: float, parameters: Parameters) -> Reply: ...  # noqa: D102
    async def aside(self, work: Callable[[], Result]) -> Result: ...  # noqa: D102
