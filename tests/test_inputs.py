"""Bodies and parameters: what is read, and that everything else gets an error that names it."""

import io
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import image_file

from web.errors import BadRequest, TooLarge, UnsupportedMedia
from web.inputs import (
    IMAGE_FORMATS,
    LARGEST_VALUE,
    Limits,
    Parameters,
    PixelBudget,
    check_array,
    decode,
    decode_image,
    parse_parameters,
)

MAX_PIXELS = 1_000_000


@dataclass(frozen=True)
class Shape:
    height: int = 8
    width: int = 8
    channels: int = 3


SHAPE, GRAY = Shape(), Shape(channels=1)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
PLANES = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)


def read(body: bytes, content_type: str = "application/octet-stream", shape: Shape = SHAPE) -> np.ndarray[Any, Any]:
    return decode(body, content_type, shape, MAX_PIXELS)


def encode(array: np.ndarray[Any, Any], format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (head, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ------------------------------------------------------------------------------------------------------------- tensors


def test_raw_pixels_are_taken_as_they_are() -> None:
    assert np.array_equal(read(PIXELS.tobytes()), PIXELS)
    assert read(PIXELS.tobytes()).dtype == np.uint8


def test_raw_floats_are_taken_as_they_are() -> None:
    assert np.array_equal(read(PLANES.tobytes()), PLANES)
    assert read(PLANES.tobytes()).dtype == np.float32


def test_curl_s_default_content_type_says_nothing_about_the_body() -> None:
    form = "application/x-www-form-urlencoded"
    assert np.array_equal(read(PIXELS.tobytes(), form), PIXELS)
    assert read(image_file("JPEG"), form).shape == (8, 8, 3)


@pytest.mark.parametrize("size", [1, 191, 193, 767, 769])
def test_a_tensor_of_another_size_is_told_both_sizes_that_fit(size: int) -> None:
    with pytest.raises(BadRequest, match=rf"^{size} bytes are neither .* expected 192 bytes .* or 768 bytes"):
        read(b"x" * size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_refused(value: float) -> None:
    broken = PLANES.copy()
    broken[1, 2, 3] = value
    with pytest.raises(BadRequest, match="not finite"):
        read(broken.tobytes())
    with pytest.raises(BadRequest, match="not finite"):
        check_array(broken, SHAPE)


@pytest.mark.parametrize("value", [LARGEST_VALUE, -LARGEST_VALUE, LARGEST_VALUE * 1.01, -1e30])
def test_a_tensor_that_no_image_could_become_is_refused(value: float) -> None:
    tensor = PLANES.copy()
    tensor[1, 2, 3] = value
    if abs(value) <= LARGEST_VALUE:
        assert np.array_equal(read(tensor.tobytes()), tensor)
        return
    reads = (lambda: read(tensor.tobytes()), lambda: check_array(tensor, SHAPE), lambda: from_json(tensor.tolist()))
    for refused in reads:
        with pytest.raises(BadRequest, match=r"values as large as .*; normalised ones are from -1000 to 1000"):
            refused()


def test_a_form_that_is_no_image_is_an_unsupported_type() -> None:
    with pytest.raises(UnsupportedMedia):
        read(b"name=value", "application/x-www-form-urlencoded")


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "application/xml", "video/mp4"])
def test_other_content_types_are_told_those_that_are_read(content_type: str) -> None:
    with pytest.raises(UnsupportedMedia, match=f"'{content_type}' is not read here; send image/"):
        read(PIXELS.tobytes(), content_type)


@pytest.mark.parametrize("content_type", ["application/octet-stream", "image/png", "application/json"])
def test_an_empty_body_is_refused(content_type: str) -> None:
    with pytest.raises(BadRequest, match="empty body"):
        read(b"", content_type)


@pytest.mark.parametrize("array", [PIXELS, PLANES])
def test_arrays_of_the_right_form_are_taken_as_they_are(array: np.ndarray[Any, Any]) -> None:
    assert check_array(array, SHAPE) is array


@pytest.mark.parametrize(
    "wrong", [PIXELS.astype(np.int64), PLANES.astype(np.float64), PIXELS.transpose(2, 0, 1), PIXELS[:7], [[1]], None]
)
def test_other_arrays_are_told_what_fits(wrong: object) -> None:
    with pytest.raises(BadRequest, match=r"^the input is .*; expected bytes, uint8 \(8, 8, 3\) .* float32 \(3, 8, 8\)"):
        check_array(wrong, SHAPE)


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("format", IMAGE_FORMATS)
@pytest.mark.parametrize("content_type", ["image/whatever", "application/octet-stream"])
def test_all_formats_are_read_by_what_they_are(format: str, content_type: str) -> None:
    image = read(image_file(format), content_type)
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)


def test_an_image_of_the_network_s_size_is_not_touched() -> None:
    assert np.array_equal(read(encode(PIXELS), "image/png"), PIXELS)


def test_an_image_with_the_size_of_a_tensor_is_still_an_image() -> None:
    for format in ("PNG", "BMP", "GIF", "WEBP"):
        flat = encode(np.full((8, 8, 3), 200, np.uint8), format, **({"lossless": True} if format == "WEBP" else {}))
        assert len(flat) <= 768
        padded = flat + bytes(768 - len(flat))
        if format == "BMP":
            padded = padded[:2] + (768).to_bytes(4, "little") + padded[6:]
        assert np.array_equal(read(padded), np.full((8, 8, 3), 200)), format


def test_pixels_that_begin_like_a_bitmap_are_still_pixels() -> None:
    body = b"BM" + PIXELS.tobytes()[2:]
    assert read(body).tobytes() == body


@pytest.mark.parametrize(("size", "expected"), [((32, 8), 96), ((8, 32), 0)])
def test_the_centre_is_cropped_in_the_network_s_proportions(size: tuple[int, int], expected: int) -> None:
    left = int(read(image_file("PNG", size), "image/png")[4, 0, 0])
    assert abs(left - expected) < 8


@pytest.mark.parametrize("size", [(8, 8), (24, 16)])
def test_a_photograph_is_turned_upright(size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read(image_file("PNG", size, exif=exif), "image/png")[:, :, 0].astype(int)
    assert (np.diff(image, axis=0) > 0).all()
    assert (np.diff(image, axis=1) == 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("shape", [SHAPE, GRAY])
def test_all_colour_modes_are_converted(mode: str, shape: Shape) -> None:
    file = io.BytesIO()
    Image.new(mode, (9, 9)).save(file, "JPEG" if mode == "CMYK" else "PNG")
    image = read(file.getvalue(), "image/png", shape)
    assert (image.shape, image.dtype) == ((8, 8, shape.channels), np.uint8)


@pytest.mark.parametrize("body", [b"not an image", b"\xff\xd8\xff", b"<svg/>", image_file("JPEG")[:-200], b"GIF89a"])
def test_what_is_no_whole_image_is_refused_with_the_known_formats(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"the image cannot be decoded: .*; known formats: JPEG, PNG"):
        read(body, "image/jpeg")


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 10_000), (40_000, 40_000), (2**31 - 1, 2**31 - 1), (1001, 1000)]
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(TooLarge, match=r"[aA]t most 1000000 pixels"):
        read(png_header(width, height), "image/png")


def test_the_images_of_one_request_share_its_pixels() -> None:
    budget = PixelBudget(1000)
    for _ in range(2):
        assert decode_image(image_file("PNG", (20, 20)), SHAPE, budget).shape == (8, 8, 3)
    with pytest.raises(TooLarge, match=r"20x20 pixels; at most 1000 pixels are .* for one request, and 200 are left"):
        decode_image(image_file("PNG", (20, 20)), SHAPE, budget)
    assert decode_image(image_file("PNG", (20, 10)), SHAPE, budget).shape == (8, 8, 3)


def test_the_photograph_s_other_exif_data_do_not_matter() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    data = exif.tobytes().replace(b"maker", b"\xff\x00\xfe\x00\xfd")
    assert read(image_file("JPEG", exif=data), "image/jpeg").shape == (8, 8, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.sampled_from(IMAGE_FORMATS), st.integers(0, 10_000), st.binary(max_size=8), st.integers(0, 8))
def test_damaged_files_are_images_or_bad_requests(format: str, position: int, new: bytes, removed: int) -> None:
    whole = image_file(format)
    position %= len(whole)
    body = whole[:position] + new + whole[position + removed :]
    try:
        image = read(body or b"x", "image/png")
    except (BadRequest, TooLarge):
        return
    assert image.shape == (8, 8, 3)


# ---------------------------------------------------------------------------------------------------------------- JSON


def from_json(inputs: object) -> np.ndarray[Any, Any]:
    return read(json.dumps({"inputs": inputs}).encode(), "application/json")


def test_json_pixels_and_json_planes_are_told_apart_by_shape() -> None:
    pixels, planes = from_json(PIXELS.tolist()), from_json(PLANES.tolist())
    assert np.array_equal(pixels, PIXELS)
    assert pixels.dtype == np.uint8
    assert np.array_equal(planes, PLANES)
    assert planes.dtype == np.float32


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 1300, "not JSON"),
        (b'{"inputs":' * 1300, "not JSON"),
        (b"[1]", "found list"),
        (b"null", "found NoneType"),
        (b'{"image": []}', "found keys image"),
        (b'{"inputs": [], "slo_ms": 5}', "found keys inputs, slo_ms"),
        (b'{"inputs": "cat"}', "must be a list, not \"cat\""),
        (b'{"inputs": {"a": 1}}', "must be a list, not an object"),
        (b'{"inputs": [{"a": 1}]}', "no tensor of numbers"),
        (b'{"inputs": [[1], [1, 2]]}', "no tensor of numbers"),
        (b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}", "no tensor of numbers"),
        (b'{"inputs": [1' + b"0" * 400 + b"]}", "no tensor of numbers"),
        (b'{"inputs": 1' + b"0" * 9000 + b"}", "not JSON"),
        (b'{"inputs": []}', r"shape \(0,\); expected \(8, 8, 3\) .* or \(3, 8, 8\)"),
        (b'{"inputs": 5}', "must be a list, not 5"),
    ],
)
def test_json_of_another_form_is_told_what_is_expected(body: bytes, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        read(body, "application/json")


@pytest.mark.parametrize("value", [-1, 256, 0.5, 1e300, None, float("nan"), float("inf")])
def test_json_pixels_are_whole_numbers_from_0_to_255(value: float) -> None:
    inputs = PIXELS.tolist()
    inputs[0][0][0] = value
    with pytest.raises(BadRequest, match="whole numbers between 0 and 255"):
        from_json(inputs)


@pytest.mark.parametrize("value", [True, False, "1", "0.5"])
@pytest.mark.parametrize("form", [PIXELS, PLANES], ids=["pixels", "planes"])
def test_json_truths_and_texts_are_no_numbers(form: np.ndarray[Any, Any], value: object) -> None:
    inputs = np.zeros(form.shape).tolist()
    inputs[0][1][2] = value
    with pytest.raises(BadRequest, match="no tensor of numbers"):
        from_json(inputs)


def test_json_that_cannot_be_one_input_is_refused_by_its_bytes() -> None:
    for body in (b" " * (64 * 1024 + 32 * 192 + 1), b'{"inputs": [' + b"[]," * 2000 + b"[]]}"):
        with pytest.raises(TooLarge, match="192 values"):
            read(body, "application/json")


@pytest.mark.parametrize("value", [None, float("nan"), 1e300, -1e39])
def test_json_planes_are_finite(value: float) -> None:
    inputs = PLANES.tolist()
    inputs[0][0][0] = value
    with pytest.raises(BadRequest, match="not finite"):
        from_json(inputs)


# ---------------------------------------------------------------------------------------------------------- parameters

LIMITS = Limits(default_slo_s=0.1, longest_slo_s=60, accuracies={"small": 0.7, "large": 0.9}, classes=5)


def parsed(query: dict[str, str] | None = None, **headers: str) -> Parameters:
    names = {"envoy": "X-Envoy-Expected-Rq-Timeout-Ms", "slo": "X-SLO-Ms", "top": "X-Top-K", "floor": "X-Min-Accuracy"}
    return parse_parameters(query or {}, {names[key]: value for key, value in headers.items()}, LIMITS)


def test_without_parameters_there_are_defaults() -> None:
    assert parsed() == Parameters(slo_s=0.1, min_accuracy=0, priority=0, top_k=1)


def test_milliseconds_become_seconds() -> None:
    assert parsed({"slo_ms": "50"}).slo_s == pytest.approx(0.05)


def test_the_query_string_wins_over_the_header_and_that_over_envoy_s() -> None:
    assert parsed({"slo_ms": "50"}, slo="60", envoy="70").slo_s == pytest.approx(0.05)
    assert parsed(slo="60", envoy="70").slo_s == pytest.approx(0.06)
    assert parsed(envoy="70").slo_s == pytest.approx(0.07)


def test_all_parameters_have_a_header() -> None:
    assert parsed({"priority": "7"}, top="3", floor="0.5") == Parameters(
        slo_s=0.1, min_accuracy=0.5, priority=7, top_k=3
    )


TRIO = Limits(default_slo_s=0.1, longest_slo_s=60, accuracies={"a": 0.7, "b": 0.8, "a+b": 0.9}, classes=5)


@pytest.mark.parametrize("text", ["a+b", "b+a", "a,b", "b a", " a , b "])  # + is a blank in a query string
def test_members_name_an_ensemble_in_any_order(text: str) -> None:
    assert parse_parameters({"members": text}, {}, TRIO).choice == "a+b"
    assert parse_parameters({}, {"X-Members": text}, TRIO).choice == "a+b"


def test_one_member_names_a_subnet_and_none_leaves_the_choice_to_the_policy() -> None:
    assert parse_parameters({"members": "b"}, {}, TRIO).choice == "b"
    assert parse_parameters({"slo_ms": "5"}, {}, TRIO).choice is None


@pytest.mark.parametrize("text", ["", "c", "a+c", "a+b+c", "+", "a++b+d"])
def test_members_that_are_no_choice_are_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^members '.*' are no choice; there are: a, b, a\+b$"):
        parse_parameters({"members": text}, {}, TRIO)


def test_a_floor_above_the_members_asked_for_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"min_accuracy 0\.75 is above that of a, 0\.7000"):
        parse_parameters({"members": "a", "min_accuracy": "0.75"}, {}, TRIO)
    with pytest.raises(BadRequest, match=r"min_accuracy 0\.95 is above the most accurate choice, 0\.9000"):
        parse_parameters({"min_accuracy": "0.95"}, {}, TRIO)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "0", "-5", "1e9", "-0.0", "abc", "", "5ms", "0x10"])
def test_an_slo_that_cannot_be_is_refused_by_name(text: str) -> None:
    for refused in ({"query": {"slo_ms": text}}, {"slo": text}, {"envoy": text}):
        with pytest.raises(BadRequest, match=r"^slo_ms must be "):
            parsed(**refused)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("min_accuracy", "1.5"), ("min_accuracy", "-0.1"), ("min_accuracy", "nan"), ("min_accuracy", "0.91"),
        ("priority", "-1"), ("priority", "101"), ("priority", "1.5"), ("priority", "high"),
        ("top_k", "0"), ("top_k", "6"), ("top_k", "2.5"), ("top_k", "all"), ("top_k", ""),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(BadRequest, match=f"^{name} "):
        parsed({name: text})


def test_an_unknown_parameter_is_told_the_known_ones() -> None:
    with pytest.raises(BadRequest, match="'slo'; known: members, min_accuracy, priority, slo_ms, top_k"):
        parsed({"slo": "50"})


@given(
    st.dictionaries(
        st.sampled_from(["slo_ms", "min_accuracy", "priority", "top_k", "x"]), st.text("0123456789.-e_ x", max_size=8)
    )
)
def test_any_text_gives_parameters_in_range_or_a_bad_request(query: dict[str, str]) -> None:
    try:
        parameters = parse_parameters(query, {}, LIMITS)
    except BadRequest:
        return
    assert 0 < parameters.slo_s <= 60
    assert 0 <= parameters.min_accuracy <= 0.9
    assert 0 <= parameters.priority <= 100
    assert 1 <= parameters.top_k <= 5
