"""What reading the inputs of an infer request takes, whichever they are: known members, rows, and time to stop at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

from web.errors import BadRequest, DeadlineExceeded, ServeError
from web.json_values import brief

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a body is to be read: ``inline``, where inputs that take long are not decoded, else until its deadline.

    ``slo_s`` is the SLO of a request that states none in its body.
    """

    clock: Callable[[], float]
    arrival_s: float
    slo_s: float
    inline: bool

    def check_deadline(self) -> None:
        """Raises DeadlineExceeded once it has passed. An SLO of 0 is an error that is told elsewhere."""
        if not self.inline and 0 < self.slo_s < self.clock() - self.arrival_s:
            message = "the deadline passed while the rows were decoded"
            raise DeadlineExceeded(message, slo_ms=round(self.slo_s * 1e3, 3))


def members(value: object, where: str, known: Iterable[str]) -> dict[str, Any]:
    """An object with none but known members."""
    if not isinstance(value, dict):
        raise BadRequest(f"{where} must be an object, not {brief(value)}")
    for name in value:
        if name.startswith(("sequence_", "triton_", "shared_memory_")):
            raise BadRequest(f"'{name:.40}' in {where}: sequences, triton_* and shared memory are not supported")
        if name not in known:
            raise BadRequest(f"unknown '{name:.40}' in {where}; known: {', '.join(known)}")
    return value


def each_row(
    make: Callable[[T], NDArray[Any]], values: Iterable[T], name: str, reading: Reading
) -> tuple[NDArray[Any], ...]:
    """The rows made of the values of an input; an error names the row, and none is begun after the deadline."""
    rows = []
    for index, value in enumerate(values):
        reading.check_deadline()
        try:
            rows.append(make(value))
        except ServeError as error:
            raise type(error)(f"row {index} of '{name}': {error}") from error
    return tuple(rows)
