"""Tensors as the Open Inference Protocol sends them: binary data beside the JSON, or JSON data; to and from arrays.

Binary data are little-endian and row by row; a BYTES element is its length as uint32, then its bytes. Numbers arrive as
FP32, FP16, BF16, UINT8, INT32 or INT64. Every way in which data cannot be what datatype and shape say is a BadRequest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from web.errors import BadRequest
from web.json_values import array_of, as_float32, as_integers, as_pixels, brief

# All datatypes of the protocol with the size of an element: a slip in a name is not the same as one not accepted.
DATATYPES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2, "BYTES": 0,
}  # fmt: skip
_LENGTH = struct.Struct("<I")
LARGEST_SIZE = 2**31
MOST_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Parts:
    """A body taken apart: the JSON in front, and the binary data after it."""

    header: memoryview
    binary: memoryview


def split_body(body: bytes, header_length: str | None) -> Parts:
    """Take a body apart by its Inference-Header-Content-Length; without one, all of it is JSON."""
    view = memoryview(body)
    if header_length is None:
        return Parts(view, view[:0])
    length = int(header_length) if header_length.isdecimal() and len(header_length) < 12 else -1
    if not 0 <= length <= len(body):
        raise BadRequest(
            f"Inference-Header-Content-Length must be between 0 and the {len(body)} bytes of the body, "
            f"not '{header_length:.40}'"
        )
    return Parts(view[:length], view[length:])


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Name, datatype and shape of a tensor that a client sends."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def describe(self) -> str:
        """For errors."""
        return f"'{self.name}' as {self.datatype} {list(self.shape)}"


def read_form(document: Mapping[str, Any]) -> TensorForm:
    """Name, datatype and shape of an element of ``inputs``; the datatype is one of the protocol's."""
    name, datatype, shape = document.get("name"), document.get("datatype"), document.get("shape")
    if not isinstance(name, str):
        raise BadRequest("an input needs a name, which is a string")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise BadRequest(f"unknown datatype {brief(datatype)} of '{name:.40}'; known: {', '.join(DATATYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < LARGEST_SIZE for size in shape):
        raise BadRequest(f"the shape of '{name:.40}' must be a list of whole numbers from 0 on")
    if len(shape) > MOST_DIMENSIONS:
        raise BadRequest(f"the shape of '{name:.40}' has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are read")
    return TensorForm(name, datatype, tuple(shape))


# --------------------------------------------------------------------------------------------------------- binary data


def numbers_from_binary(form: TensorForm, data: memoryview) -> NDArray[Any]:
    """The tensor that the bytes hold: uint8, int64 for INT32 and INT64, or float32 for all floating point datatypes."""
    needed = form.elements * DATATYPES[form.datatype]
    if len(data) != needed:
        raise BadRequest(f"{form.describe()} has {needed} bytes; {len(data)} were sent")
    match form.datatype:
        case "UINT8":
            array: NDArray[Any] = np.frombuffer(data, np.uint8)
        case "FP16":
            array = np.frombuffer(data, "<f2").astype(np.float32)
        case "INT32" | "INT64":
            array = np.frombuffer(data, "<i4" if form.datatype == "INT32" else "<i8").astype(np.int64)
        case "BF16":  # the upper half of a float32
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case _:  # JSON of any length may come before, and torch takes aligned arrays only
            array = np.require(np.frombuffer(data, "<f4"), np.float32, "A")
    return array.reshape(form.shape)


def bytes_from_binary(form: TensorForm, data: memoryview) -> list[bytes]:
    """The elements of a BYTES tensor."""
    found: list[bytes] = []
    position = 0
    while position < len(data) and len(found) < form.elements:
        if position + _LENGTH.size > len(data):
            raise BadRequest(f"{form.describe()} ends within the length of element {len(found)}")
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        if position + length > len(data):
            left = len(data) - position
            raise BadRequest(f"element {len(found)} of {form.describe()} has {length} bytes; only {left} were sent")
        found.append(bytes(data[position : position + length]))
        position += length
    if position != len(data) or len(found) != form.elements:
        raise BadRequest(f"{form.describe()}: found {len(found)} elements in {position} of {len(data)} bytes")
    return found


def bytes_to_binary(values: Sequence[bytes]) -> bytes:
    """The binary data of a BYTES tensor."""
    return b"".join(_LENGTH.pack(len(value)) + value for value in values)


def floats_to_binary(values: NDArray[np.float32]) -> bytes:
    """The binary data of an FP32 tensor."""
    return np.ascontiguousarray(values, "<f4").tobytes()


# ----------------------------------------------------------------------------------------------------------- JSON data


def numbers_from_json(form: TensorForm, data: object) -> NDArray[Any]:
    """The tensor of FP32, UINT8, INT32 or INT64 that a flat or nested list of numbers holds."""
    if form.datatype in ("FP16", "BF16"):
        raise BadRequest(f"{form.describe()}: {form.datatype} is sent as binary data; JSON has no such numbers")
    what = f"the data of '{form.name}'"
    array = array_of(data, what)
    if array.shape not in (form.shape, (form.elements,)):
        raise BadRequest(f"the data of {form.describe()} have the shape {list(array.shape)}")
    if form.datatype in ("INT32", "INT64"):
        return as_integers(array, what).reshape(form.shape)
    found = as_pixels(array, what) if form.datatype == "UINT8" else as_float32(array)
    return found.reshape(form.shape)


def texts_from_json(form: TensorForm, data: object) -> list[str]:
    """The elements of a BYTES tensor, a string each in flat or nested lists."""
    found: list[Any] = data if isinstance(data, list) else [data]
    while any(isinstance(each, list) for each in found) and len(found) <= form.elements:
        found = [text for each in found for text in (each if isinstance(each, list) else [each])]
    for each in found:
        if not isinstance(each, str):
            raise BadRequest(f"the data of {form.describe()} must be strings, not {brief(each)}")
    if len(found) != form.elements:
        raise BadRequest(f"the data of {form.describe()} are {len(found)} strings")
    return found
