"""JSON that clients send: bounded before it is parsed, turned into arrays, and named in errors.

Three bytes of JSON (``[],``) take sixty and more in memory. So what cannot fit is refused by its bytes, before anything
is made of it. And json and numpy hold the interpreter while they work, on a thread as well. So large documents are read
in a way that lets others have it in between.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from web.errors import BadRequest, TooLarge

# A float64 has 24 characters at most; a separator and some indentation come with it.
BYTES_PER_VALUE = 32
# For all that is not a value of a tensor.
SPARE_BYTES, SPARE_MARKS = 64 * 1024, 1024
# Larger documents, and lists of more values, take milliseconds.
QUICK_BYTES, QUICK_VALUES = 32 * 1024, 4096


def parse_json(text: bytes | memoryview, values: int, what: str, hint: str = "") -> Any:
    """The document that ``text`` is, in which at most so many numbers are of use; raises TooLarge or BadRequest."""
    most_bytes = SPARE_BYTES + BYTES_PER_VALUE * values
    if len(text) > most_bytes:
        raise TooLarge(f"{what} has {len(text)} bytes of JSON; at most {most_bytes} are read, for {values} values")
    text = bytes(text)
    brackets, commas = text.count(b"[") + text.count(b"{"), text.count(b",")
    if commas > values + SPARE_MARKS or brackets > 2 * values + SPARE_MARKS:  # lists may hold one value each
        raise TooLarge(f"{what} has {brackets} lists and objects and {commas} commas; at most {values} values are read")
    try:
        if len(text) <= QUICK_BYTES:
            return json.loads(text)
        return json.loads(text, parse_float=_read_float, parse_int=_read_int)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{what} is not JSON: {error}{hint}") from error


# Functions in Python, as the interpreter changes threads between their steps, and not within those in C.
def _read_float(digits: str) -> float:
    return float(digits)


def _read_int(digits: str) -> int:
    return int(digits)


def array_of(nested: object, what: str) -> NDArray[np.float64]:
    """The numbers in a list, or in lists in lists, null being none (NaN); raises BadRequest."""
    if not isinstance(nested, list):
        raise BadRequest(f"{what}: no tensor of numbers, which must be a list, not {brief(nested)}")
    step = 1 if nested and isinstance(nested[0], list) else QUICK_VALUES
    pieces = [nested[start : start + step] for start in range(0, len(nested), step)]
    try:
        arrays = [np.array(piece, np.float64) for piece in pieces]
        array = np.concatenate(arrays) if arrays else np.array([], np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"{what}: no tensor of numbers: {error}") from None
    if not all(map(_only_numbers, pieces)):
        raise BadRequest(f"{what}: no tensor of numbers: true, false and texts are none")
    return array


def _only_numbers(nested: list[Any]) -> bool:
    """Whether lists, no deeper than an array can be, hold numbers or null; numpy would also convert others."""
    kinds = set(map(type, nested))
    return kinds <= {int, float, type(None)} or (kinds == {list} and all(map(_only_numbers, nested)))


def as_pixels(array: NDArray[np.float64], what: str) -> NDArray[np.uint8]:
    """The numbers as uint8; raises BadRequest for those that are none."""
    if not ((array >= 0) & (array <= 255) & (array == np.floor(array))).all():
        raise BadRequest(f"{what}: pixels must be whole numbers between 0 and 255")
    return array.astype(np.uint8)


def as_integers(array: NDArray[np.float64], what: str) -> NDArray[np.int64]:
    """The numbers as int64; raises BadRequest for those that are none, or beyond ±2^31."""
    if not ((np.abs(array) <= 2**31) & (array == np.floor(array))).all():
        raise BadRequest(f"{what}: must be whole numbers of 32 bits")
    return array.astype(np.int64)


def as_float32(array: NDArray[np.float64]) -> NDArray[np.float32]:
    """The numbers as float32, those that are too large for it as infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def brief(value: object) -> str:
    """A value that a client sent, short enough for an error: objects and lists by their kind, others as JSON."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return json.dumps(value[:60] if isinstance(value, str) else value)[:60]
