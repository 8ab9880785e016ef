"""From an HTTP request to one network input: parameters, and bodies that are images, raw tensors or JSON."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from web import jpegs
from web.errors import BadRequest, TooLarge, UnsupportedMedia
from web.json_values import array_of, as_float32, as_pixels, parse_json

# Larger bodies and images are decoded on a thread, so that one photograph does not hold up the queries of others.
INLINE_BODY_BYTES = 32 * 1024
INLINE_PIXELS = 256 * 256
# The largest absolute value of a normalised tensor, whose values are a few units; much larger ones make a network
# overflow. That is told here, as no answer of the network could tell such an input from a fault of the device.
LARGEST_VALUE = 1000.0

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pillow warns of large images, which are refused below before they are decoded, and of damaged EXIF data.
warnings.filterwarnings("ignore", module=r"PIL\.")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")
# What Pillow raises on damaged files, found by fuzzing; DecompressionBombError is a class of its own.
_DAMAGED = (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# What curl sends unless told otherwise; says nothing about the body.
_UNTYPED = ("", "application/octet-stream", "application/x-www-form-urlencoded")


class ImageShape(Protocol):
    """The part of supernet.InputSpec that decoding needs."""

    @property
    def height(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102


@dataclass(slots=True)
class PixelBudget:
    """How many pixels may be decoded for one request, and how many of them are left."""

    most: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.most

    def spend(self, width: int, height: int) -> None:
        """Take an image into account, before it is decoded; raises TooLarge."""
        if width * height > self.left:
            spent = "" if self.left == self.most else f" for one request, and {self.left} are left"
            raise TooLarge(f"an image of {width}x{height} pixels; at most {self.most} pixels are decoded{spent}")
        self.left -= width * height


@dataclass(frozen=True, slots=True)
class ImageForm:
    """What an image servable takes, and how requests are read; a TextForm (texts.py) does it for texts."""

    shape: ImageShape
    max_pixels: int

    @property
    def least_bytes(self) -> int:
        """What any input takes, which is as pixels."""
        return self.shape.height * self.shape.width * self.shape.channels

    def check(self, value: object) -> NDArray[Any]:
        """An array that is one input already; raises BadRequest for any other."""
        return check_array(value, self.shape)

    def decode_inline(self, body: bytes, content_type: str) -> NDArray[Any] | None:
        """As ``decode``; None for what would take long."""
        if len(body) > INLINE_BODY_BYTES:
            return None
        try:
            return decode(body, content_type, self.shape, min(INLINE_PIXELS, self.max_pixels))
        except TooLarge:
            return None  # a small file can hold a large image, which is then looked at again

    def decode(self, body: bytes, content_type: str) -> NDArray[Any]:
        """The input in a body; raises as the function ``decode``."""
        return decode(body, content_type, self.shape, self.max_pixels)


# ---------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What a client may ask for beside the input itself."""

    slo_s: float
    min_accuracy: float
    priority: int
    top_k: int
    choice: str | None = None  # the subnet or ensemble that is to answer; left to the policy unless given


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What parameters may be, and what they are when not given; ``accuracies`` are those of all choices, by name."""

    default_slo_s: float
    longest_slo_s: float
    accuracies: Mapping[str, float]
    classes: int
    defaults: Parameters = field(init=False)

    def __post_init__(self) -> None:
        defaults = Parameters(slo_s=self.default_slo_s, min_accuracy=0.0, priority=0, top_k=1)
        object.__setattr__(self, "defaults", defaults)

    @property
    def best_accuracy(self) -> float:
        """That of the most accurate choice."""
        return max(self.accuracies.values())

    def choice_of(self, members: str) -> str:
        """The choice with these members, in any order, of a subnet only itself; BadRequest where there is none."""
        wanted = set(re.split(r"[+,\s]+", members.strip()))
        for name in self.accuracies:
            if set(name.split("+")) == wanted:
                return name
        raise BadRequest(f"members '{members:.80}' are no choice; there are: {', '.join(self.accuracies)}")


def parse_parameters(query: Mapping[str, str], headers: Mapping[str, str], limits: Limits) -> Parameters:
    """Parameters from the query string or, in the form ``X-SLO-Ms``, from headers; the query string wins.

    Raises BadRequest for unknown names in the query string and for values out of range.
    """
    if not query and not any(map(headers.__contains__, _HEADERS)):
        return limits.defaults  # as most ask, in a tenth of the time
    unknown = query.keys() - _PARAMETERS.keys()
    if unknown:
        raise BadRequest(f"unknown parameter '{min(unknown):.40}'; known: {', '.join(sorted(_PARAMETERS))}")
    given = {name: query.get(name, headers.get(header)) for name, header in _PARAMETERS.items()}
    if given["slo_ms"] is None:
        given["slo_ms"] = headers.get(_ENVOY)
    slo_ms = number("slo_ms", given["slo_ms"], limits.default_slo_s * 1e3, 0, limits.longest_slo_s * 1e3)
    if slo_ms <= 0:
        raise BadRequest("slo_ms must be above 0")
    min_accuracy = number("min_accuracy", given["min_accuracy"], 0.0, 0, 1)
    if min_accuracy > limits.best_accuracy:
        raise BadRequest(f"min_accuracy {min_accuracy:g} is above the most accurate choice, {limits.best_accuracy:.4f}")
    choice = None if given["members"] is None else limits.choice_of(given["members"])
    if choice is not None and limits.accuracies[choice] < min_accuracy:
        raise BadRequest(f"min_accuracy {min_accuracy:g} is above that of {choice}, {limits.accuracies[choice]:.4f}")
    return Parameters(
        slo_s=slo_ms / 1e3,
        min_accuracy=min_accuracy,
        priority=whole_number("priority", given["priority"], 0, 0, 100),
        top_k=whole_number("top_k", given["top_k"], 1, 1, limits.classes),
        choice=choice,
    )


_PARAMETERS = {
    "slo_ms": "X-SLO-Ms",
    "min_accuracy": "X-Min-Accuracy",
    "priority": "X-Priority",
    "top_k": "X-Top-K",
    "members": "X-Members",
}
_ENVOY = "X-Envoy-Expected-Rq-Timeout-Ms"
_HEADERS = (*_PARAMETERS.values(), _ENVOY)


def number(name: str, text: str | None, default: float, low: float, high: float) -> float:
    """The number that a parameter's text says, ``default`` if there is none; BadRequest outside of the limits."""
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise BadRequest(f"{name} must be a number, not '{text[:40]}'") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise BadRequest(f"{name} must be between {low:g} and {high:g}, not {text[:40]}")
    return value


def whole_number(name: str, text: str | None, default: int, low: int, high: int) -> int:
    """As ``number``, without fractions."""
    value = number(name, text, default, low, high)
    if value != int(value):
        raise BadRequest(f"{name} must be a whole number, not {value:g}")
    return int(value)


# -------------------------------------------------------------------------------------------------------------- bodies


def decode(body: bytes, content_type: str, shape: ImageShape, max_pixels: int) -> NDArray[Any]:
    """One input: pixels as uint8 (H, W, C), or an already normalised tensor as float32 (C, H, W).

    Raises BadRequest, TooLarge or UnsupportedMedia, naming what was wrong and what is allowed.
    """
    if not body:
        raise BadRequest("empty body; send an image, a raw tensor or JSON")
    if content_type == "application/json":
        return _from_json(body, shape)
    if content_type in _UNTYPED:
        return _from_untyped(body, content_type, shape, max_pixels)
    if content_type.startswith("image/"):
        return decode_image(body, shape, PixelBudget(max_pixels))
    raise UnsupportedMedia(
        f"content type '{content_type:.80}' is not read here; send image/*, application/octet-stream or "
        "application/json, for example: curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'"
    )


def check_array(array: object, shape: ImageShape) -> NDArray[Any]:
    """An array that is one input already; raises BadRequest for any other."""
    pixels, planes = (shape.height, shape.width, shape.channels), (shape.channels, shape.height, shape.width)
    if isinstance(array, np.ndarray):
        if array.dtype == np.uint8 and array.shape == pixels:
            return array
        if array.dtype == np.float32 and array.shape == planes:
            return _checked(array)
    found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    raise BadRequest(f"the input is {found}; expected bytes, uint8 {pixels} (pixels) or float32 {planes} (normalised)")


def _from_untyped(body: bytes, content_type: str, shape: ImageShape, max_pixels: int) -> NDArray[Any]:
    # First the images: a small one can have the size of a tensor, but no tensor happens to begin as an image does.
    if _looks_encoded(body):
        return decode_image(body, shape, PixelBudget(max_pixels))
    values = shape.height * shape.width * shape.channels
    if len(body) == values:
        return np.frombuffer(body, np.uint8).reshape(shape.height, shape.width, shape.channels)
    if len(body) == 4 * values:
        return _checked(np.frombuffer(body, "<f4").reshape(shape.channels, shape.height, shape.width))
    size = f"{shape.height}x{shape.width}x{shape.channels}"
    message = (
        f"{len(body)} bytes are neither an image nor a raw tensor: expected {values} bytes (uint8 {size}, pixels) or "
        f"{4 * values} bytes (float32 {shape.channels}x{shape.height}x{shape.width}, normalised)"
    )
    raise (BadRequest if content_type == "application/octet-stream" else UnsupportedMedia)(message)


def _looks_encoded(body: bytes) -> bool:
    if body.startswith(b"BM"):  # too short to be sure of; the size of the file follows
        return int.from_bytes(body[2:6], "little") == len(body)
    return body.startswith(_MAGIC) or (body.startswith(b"RIFF") and body[8:12] == b"WEBP")


def _checked(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(tensor).max())
    if not math.isfinite(largest):
        raise BadRequest("the tensor contains values that are not finite")
    if largest > LARGEST_VALUE:
        limits = f"{-LARGEST_VALUE:g} to {LARGEST_VALUE:g}"
        raise BadRequest(f"the tensor contains values as large as {largest:g}; normalised ones are from {limits}")
    return tensor


def decode_image(body: bytes, shape: ImageShape, budget: PixelBudget) -> NDArray[np.uint8]:
    """The pixels of an image file, scaled to the network's size; raises BadRequest or TooLarge."""
    if not body:
        raise BadRequest("an empty image")
    form = shape.height, shape.width, shape.channels
    if jpegs.is_plain(body, *form):
        budget.spend(shape.width, shape.height)
        pixels = jpegs.decoded(body, *form)
        if pixels is not None:
            return pixels
        budget.left += shape.width * shape.height  # spent again below, if Pillow gets as far
    try:
        with Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as image:
            budget.spend(image.width, image.height)
            return _resized(image, shape)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooLarge(f"{error} At most {budget.most} pixels are decoded.") from error
    except _DAMAGED as error:
        why = str(error).partition(" <")[0]  # Pillow quotes the buffer that it was given
        raise BadRequest(f"the image cannot be decoded: {why}; known formats: {', '.join(IMAGE_FORMATS)}") from error


def _resized(image: Image.Image, shape: ImageShape) -> NDArray[np.uint8]:
    """The centre of the image, in the network's proportions, scaled to its size."""
    mode = "L" if shape.channels == 1 else "RGB"
    if image.size != (shape.width, shape.height):
        image.draft(mode, (2 * shape.width, 2 * shape.height))  # JPEGs of large photographs decode at a fraction
    # ImageOps.exif_transpose would also write the EXIF data anew, which fails where they are damaged.
    turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    image = image.convert(mode)
    if turn is not None:
        image = image.transpose(turn)
    if image.size != (shape.width, shape.height):
        scale = min(image.width / shape.width, image.height / shape.height)
        width, height = shape.width * scale, shape.height * scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
        image = image.resize((shape.width, shape.height), Image.Resampling.BICUBIC, box)
    return np.asarray(image, np.uint8).reshape(shape.height, shape.width, shape.channels)


def _from_json(body: bytes, shape: ImageShape) -> NDArray[Any]:
    pixels, planes = (shape.height, shape.width, shape.channels), (shape.channels, shape.height, shape.width)
    document = parse_json(body, math.prod(pixels), "the body")
    if not isinstance(document, dict) or document.keys() != {"inputs"}:
        found = f"keys {', '.join(map(str, document))}" if isinstance(document, dict) else type(document).__name__
        raise BadRequest(f'JSON must be an object with the one key "inputs"; found {found[:200]}')
    array = array_of(document["inputs"], '"inputs"')
    if array.shape == planes:
        return _checked(as_float32(array))
    if array.shape != pixels:
        raise BadRequest(f'"inputs" has shape {array.shape}; expected {pixels} (pixels) or {planes} (normalised)')
    return as_pixels(array, '"inputs"')
