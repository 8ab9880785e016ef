"""JPEGs of the network's own size, straight from Pillow's decoder.

What Pillow does in Python for any file takes longer than decoding a small one. So a plain JPEG, which needs no scaling,
turning or conversion, is given to the decoder as Pillow would give it. Everything else is Pillow's: files with other
sizes, kinds of colour, EXIF, or anything that is not certain, and all that turn out to be damaged.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Segments that say nothing beyond what the decoder itself reads: JFIF, tables of quantisation and of codes, restarts.
_PLAIN = frozenset((0xE0, 0xDB, 0xC4, 0xDD))
_FRAMES = frozenset((0xC0, 0xC2))  # baseline and progressive
_SCAN = 0xDA
_MODES = {1: "L", 3: "RGB"}  # by the number of colours
# Pillow reads files in blocks of so many bytes.
LARGEST_BYTES = 65536


def is_plain(body: bytes, height: int, width: int, channels: int) -> bool:
    """Whether this is such a JPEG, as far as the segments before its scan tell."""
    if not body.startswith(b"\xff\xd8\xff") or len(body) > LARGEST_BYTES or channels not in _MODES:
        return False
    position, end, framed = 2, len(body) - 10, False
    while position < end and body[position] == 0xFF:
        marker = body[position + 1]
        if marker == _SCAN:
            return framed
        if marker in _FRAMES and not framed:
            framed = (
                body[position + 4] == 8  # bits
                and (body[position + 5] << 8 | body[position + 6]) == height
                and (body[position + 7] << 8 | body[position + 8]) == width
                and body[position + 9] == channels
            )
            if not framed:
                return False
        elif marker not in _PLAIN:
            return False
        position += 2 + (body[position + 2] << 8 | body[position + 3])
    return False


def decoded(body: bytes, height: int, width: int, channels: int) -> NDArray[np.uint8] | None:
    """The pixels (height, width, channels) of a JPEG that is plain; None if Pillow is to say what is wrong with it."""
    mode, core = _MODES[channels], cast(Any, Image).core
    try:
        image, decoder = core.new(mode, (width, height)), core.jpeg_decoder(mode, mode, "", 1, 0)
        whole = (0, 0, width, height)
        try:
            decoder.setimage(image, whole)
            more, error = decoder.decode(body)
        finally:
            decoder.cleanup()
        if more >= 0 or error < 0:  # it ends too early, or is damaged
            return None
        encoder = core.raw_encoder(mode, mode, 0, 1)
        encoder.setimage(image, whole)
        _, _, pixels = encoder.encode(height * width * channels)
        return _shaped(pixels, height, width, channels)
    except (AttributeError, TypeError):  # these are no public parts of Pillow, which may change them
        return None


def _shaped(pixels: Any, height: int, width: int, channels: int) -> NDArray[np.uint8] | None:
    if len(pixels) != height * width * channels:
        return None
    return np.frombuffer(pixels, np.uint8).reshape(height, width, channels)
