"""Plain JPEGs are decoded to the pixels that Pillow would give, and everything else is left to it."""

from __future__ import annotations

import io
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from web import jpegs
from web.errors import BadRequest
from web.inputs import PixelBudget, decode_image

HEIGHT, WIDTH = 12, 20


def picture(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), **saving: object) -> bytes:
    file = io.BytesIO()
    picture(mode, size).save(file, "JPEG", **saving)
    return file.getvalue()


def pillows(body: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image.convert(mode)).reshape(HEIGHT, WIDTH, -1)


SAVED: dict[str, dict[str, object]] = {
    "as usual": {}, "progressive": {"progressive": True}, "optimised": {"optimize": True, "quality": 30},
    "not subsampled": {"subsampling": 0}, "subsampled": {"subsampling": 2}, "restarting": {"restart_marker_blocks": 1},
}  # fmt: skip


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_pixels_of_plain_files_are_pillow_s(saved: str, mode: str, channels: int) -> None:
    body = jpeg(mode, **SAVED[saved])
    assert jpegs.is_plain(body, HEIGHT, WIDTH, channels)
    pixels = jpegs.decoded(body, HEIGHT, WIDTH, channels)
    assert pixels is not None
    assert np.array_equal(pixels, pillows(body, mode))
    shape = SimpleNamespace(height=HEIGHT, width=WIDTH, channels=channels)
    budget = PixelBudget(1000)
    assert np.array_equal(decode_image(body, shape, budget), pixels)
    assert budget.left == 1000 - HEIGHT * WIDTH


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return jpeg(exif=exif)


OTHERS = {
    "of another size": jpeg(size=(WIDTH, HEIGHT + 1)), "lying": jpeg(size=(HEIGHT, WIDTH)), "turned by EXIF": turned(),
    "grey": jpeg("L"), "for print": jpeg("CMYK"), "with a profile of colours": jpeg(icc_profile=b"profile"),
    "with a comment": jpeg(comment=b"hello"), "large": jpeg() + bytes(jpegs.LARGEST_BYTES), "empty": b"",
    "cut short": jpeg()[:60], "of two segments": b"\xff\xd8\xff\xd9", "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_all_other_files_are_left_to_pillow(kind: str) -> None:
    assert not jpegs.is_plain(OTHERS[kind], HEIGHT, WIDTH, 3)


def test_a_plain_file_that_ends_too_early_is_told_as_pillow_tells_it() -> None:
    body = jpeg()[:-30]
    assert jpegs.is_plain(body, HEIGHT, WIDTH, 3)
    assert jpegs.decoded(body, HEIGHT, WIDTH, 3) is None
    shape, budget = SimpleNamespace(height=HEIGHT, width=WIDTH, channels=3), PixelBudget(HEIGHT * WIDTH)
    with pytest.raises(BadRequest, match="the image cannot be decoded: image file is truncated"):
        decode_image(body, shape, budget)


@given(position=st.integers(0, 2000), new=st.binary(max_size=3), removed=st.integers(0, 3), progressive=st.booleans())
def test_a_changed_file_has_the_pixels_that_pillow_sees_if_it_sees_any(
    position: int, new: bytes, removed: int, progressive: bool
) -> None:
    body = jpeg(progressive=progressive)
    position %= len(body)
    body = body[:position] + new + body[position + removed :]
    if jpegs.is_plain(body, HEIGHT, WIDTH, 3):
        pixels = jpegs.decoded(body, HEIGHT, WIDTH, 3)
        with suppress(OSError, SyntaxError, ValueError, TypeError, IndexError, ArithmeticError):
            expected = pillows(body)
            assert pixels is not None
            assert np.array_equal(pixels, expected)


def test_a_pillow_with_other_parts_decodes_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    body = jpeg()
    monkeypatch.setattr(Image, "core", SimpleNamespace())
    assert jpegs.decoded(body, HEIGHT, WIDTH, 3) is None
