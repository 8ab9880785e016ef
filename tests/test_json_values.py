"""JSON is bounded before it is parsed, and what is named in an error stays short."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from web.errors import BadRequest, TooLarge
from web.json_values import array_of, as_float32, as_pixels, brief, parse_json

LONGEST = -1.2345678901234567e-300


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 1), (1, 500, 1), (3, 64, 64), (64, 3, 8, 8)])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_longest_numbers_fit_in_lists_of_any_shape(shape: tuple[int, ...], indent: int | None) -> None:
    document = {"inputs": np.full(shape, LONGEST).tolist()}
    text = json.dumps(document, indent=indent).encode()
    assert parse_json(text, int(np.prod(shape)), "the body") == document


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b" " * (65536 + 3200 + 1), "68737 bytes of JSON; at most 68736 are read, for 100 values"),
        (b"[" + b"[]," * 1300 + b"[]]", "1302 lists and objects and 1300 commas; at most 100 values"),
        (b"[" + b"{}," * 1300 + b"{}]", "1302 lists and objects"),
        (b"[" + b"0," * 1300 + b"0]", "1 lists and objects and 1300 commas"),
        (b"[" * 1300, "1300 lists"),
    ],
)
def test_what_cannot_fit_is_refused_by_its_bytes(text: bytes, named: str) -> None:
    with pytest.raises(TooLarge, match=f"^the body has {named}"):
        parse_json(text, 100, "the body")


def test_large_documents_are_read_as_small_ones_are() -> None:
    document = {"inputs": [[1, -2.5, 1e300, None, True, "x", {"a": 2**70}]] * 2000}
    text = json.dumps(document).encode()
    found = parse_json(memoryview(text), 20_000, "the body")
    assert found == document
    assert [type(value) for value in found["inputs"][0][:4]] == [int, float, float, type(None)]


@pytest.mark.parametrize("shape", [(0,), (1,), (5000,), (9000,), (64, 3, 8, 8), (2, 0), (1, 1, 1), (9, 5000)])
def test_lists_of_any_shape_become_arrays_piece_by_piece(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape)
    assert np.array_equal(array_of(array.tolist(), "here"), array)


def test_what_is_no_json_is_refused_with_a_hint() -> None:
    for text in (b"", b"{", b"\xff", b"[" * 1100, b"1" * 5000):
        with pytest.raises(BadRequest, match=r"^the body is not JSON: .*; look here$"):
            parse_json(text, 100, "the body", "; look here")


NO_NUMBERS = [
    [True], [[1, "2"]], [["1"]], ["x"], [{}], [[1], [1, 2]], [[1], 1], [1] * 5000 + [[1]], [0.5] * 5000 + [True],
    [10**400], None, "1", {}, 5,
]  # fmt: skip


@pytest.mark.parametrize("nested", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_what_is_no_tensor_of_numbers_is_refused(nested: object) -> None:
    with pytest.raises(BadRequest, match=r"^here: no tensor of numbers"):
        array_of(nested, "here")


def test_numbers_become_pixels_or_floats() -> None:
    array = array_of([[0, 255], [1.0, 2]], "here")
    assert as_pixels(array, "here").tolist() == [[0, 255], [1, 2]]
    assert as_float32(array_of([1e300, None, -0.5], "here")).tolist()[::2] == [np.inf, -0.5]
    for wrong in (-1, 256, 0.5, None):
        with pytest.raises(BadRequest, match="whole numbers between 0 and 255"):
            as_pixels(array_of([wrong], "here"), "here")


def test_containers_are_named_by_their_kind_however_deep_and_large() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert brief(deep) == brief([0] * 1_000_000) == "a list"
    assert brief({"a": deep}) == "an object"
    while deep:  # else its end would take it apart by recursion
        deep = deep.pop()


@given(st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_other_values_are_told_as_json_and_shortened(value: object) -> None:
    assert brief(value) == json.dumps(value)[:60] or (isinstance(value, str) and len(value) > 60)
    assert len(brief(value)) <= 60
