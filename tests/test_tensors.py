"""The tensor codec, against tritonclient's own and against all that is damaged."""

import json
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from web.errors import BadRequest
from web.tensors import (
    DATATYPES,
    TensorForm,
    bytes_from_binary,
    bytes_to_binary,
    floats_to_binary,
    numbers_from_binary,
    numbers_from_json,
    read_form,
    split_body,
)

SHAPES = arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
FLOATS = arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False))
BYTES = st.lists(st.binary(max_size=20), max_size=6)


def form_of(datatype: str, shape: tuple[int, ...]) -> TensorForm:
    return TensorForm("input", datatype, shape)


@given(FLOATS, st.integers(0, 7))
def test_fp32_comes_back_as_it_was_wherever_it_lies(array: NDArray[np.float32], offset: int) -> None:
    data = memoryview(bytes(offset) + floats_to_binary(array))[offset:]
    back = numbers_from_binary(form_of("FP32", array.shape), data)
    assert back.flags.aligned
    np.testing.assert_array_equal(back, array)


@given(arrays.arrays(np.uint8, SHAPES))
def test_uint8_comes_back_as_it_was(array: NDArray[np.uint8]) -> None:
    back = numbers_from_binary(form_of("UINT8", array.shape), memoryview(array.tobytes()))
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, array)


@given(arrays.arrays(np.float16, SHAPES, elements=st.floats(width=16, allow_nan=False)))
def test_fp16_becomes_the_same_numbers_in_float32(array: NDArray[np.float16]) -> None:
    back = numbers_from_binary(form_of("FP16", array.shape), memoryview(array.tobytes()))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, array.astype(np.float32))


@given(FLOATS)
def test_bf16_becomes_the_same_numbers_in_float32(array: NDArray[np.float32]) -> None:
    halved = array.astype(ml_dtypes.bfloat16)
    back = numbers_from_binary(form_of("BF16", array.shape), memoryview(halved.tobytes()))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, halved.astype(np.float32))


@given(BYTES)
def test_bytes_are_written_and_read_as_tritonclient_does(values: list[bytes]) -> None:
    data = bytes_to_binary(values)
    array = np.array(values, np.object_)
    assert data == (serialize_byte_tensor(array).item() if values else b"")
    assert list(deserialize_bytes_tensor(data)) == values
    assert bytes_from_binary(form_of("BYTES", (len(values),)), memoryview(data)) == values


@given(FLOATS, st.booleans())
def test_json_numbers_come_back_flat_or_nested(array: NDArray[np.float32], flat: bool) -> None:
    data = json.loads(json.dumps((array.ravel() if flat else array).tolist()))
    form = form_of("FP32", array.shape)
    if array.size == 0 and not flat:
        return  # nested lists do not tell the size of what is inside an empty one
    back = numbers_from_json(form, data)
    assert (back.dtype, back.shape) == (np.float32, array.shape)
    np.testing.assert_array_equal(back, array)


def test_the_datatypes_have_the_sizes_that_tritonclient_knows() -> None:
    sizes = {name: np.dtype(triton_to_np_dtype(name)).itemsize for name in DATATYPES if name != "BYTES"}
    assert sizes | {"BYTES": 0} == DATATYPES


@given(st.binary(max_size=60), st.integers(0, 4))
def test_no_bytes_at_all_make_the_codec_fail_otherwise_than_it_says(data: bytes, elements: int) -> None:
    for datatype in ("FP32", "FP16", "BF16", "UINT8"):
        try:
            assert len(numbers_from_binary(form_of(datatype, (elements,)), memoryview(data))) == elements
        except BadRequest as error:
            assert "'input' as" in str(error)  # noqa: PT017 either outcome is right, and this is what it must be
    try:
        assert len(bytes_from_binary(form_of("BYTES", (elements,)), memoryview(data))) == elements
    except BadRequest as error:
        assert "'input' as BYTES" in str(error)  # noqa: PT017


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@given(JSON_VALUES, st.sampled_from(("FP32", "UINT8", "FP16")), st.lists(st.integers(0, 3), max_size=3))
def test_no_json_at_all_makes_the_codec_fail_otherwise_than_it_says(data: Any, datatype: str, shape: list[int]) -> None:
    try:
        assert numbers_from_json(form_of(datatype, tuple(shape)), data).shape == tuple(shape)
    except BadRequest as error:
        assert "'input'" in str(error)  # noqa: PT017 either outcome is right


@given(JSON_VALUES, JSON_VALUES, JSON_VALUES)
def test_no_form_is_read_otherwise_than_as_it_stands(name: Any, datatype: Any, shape: Any) -> None:
    try:
        form = read_form({"name": name, "datatype": datatype, "shape": shape})
    except BadRequest:
        return
    assert form == TensorForm(name, datatype, tuple(shape))


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "named"),
    [
        ("FP32", (2,), bytes(7), "has 8 bytes; 7 were sent"),
        ("FP32", (2,), bytes(9), "has 8 bytes; 9 were sent"),
        ("BF16", (1, 3), bytes(12), "has 6 bytes; 12 were sent"),
        ("BYTES", (1,), bytes(3), "ends within the length of element 0"),
        ("BYTES", (1,), struct.pack("<I", 5) + b"four", "element 0 .* has 5 bytes; only 4 were sent"),
        ("BYTES", (1,), struct.pack("<I", 2**32 - 1), "element 0 .* has 4294967295 bytes; only 0 were sent"),
        ("BYTES", (2,), bytes(4), "found 1 elements in 4 of 4 bytes"),
        ("BYTES", (1,), bytes(8), "found 1 elements in 4 of 8 bytes"),
    ],
)
def test_binary_data_of_another_length_are_refused(
    datatype: str, shape: tuple[int, ...], data: bytes, named: str
) -> None:
    read = bytes_from_binary if datatype == "BYTES" else numbers_from_binary
    with pytest.raises(BadRequest, match=named):
        read(form_of(datatype, shape), memoryview(data))


@pytest.mark.parametrize(
    ("datatype", "data", "named"),
    [
        ("FP32", [1, 2, 3], r"have the shape \[3\]"),
        ("FP32", [[1], [2, 3]], "no tensor of numbers"),
        ("FP32", ["a", "b"], "no tensor of numbers"),
        ("FP32", [{}, 1], "no tensor of numbers"),
        ("FP32", [10**400, 1], "no tensor of numbers"),
        ("FP32", ["1", "2"], "no tensor of numbers: true, false and texts are none"),
        ("FP32", [[0.5], ["2"]], "no tensor of numbers: true, false and texts are none"),
        ("UINT8", [True, 0], "no tensor of numbers: true, false and texts are none"),
        ("FP32", 5, "must be a list, not 5"),
        ("FP32", {"b64": ""}, "must be a list"),
        ("FP32", [[[1, 2]]], r"have the shape \[1, 1, 2\]"),
        ("UINT8", [0.5, 1], "whole numbers between 0 and 255"),
        ("UINT8", [-1, 1], "whole numbers between 0 and 255"),
        ("UINT8", [256, 1], "whole numbers between 0 and 255"),
        ("UINT8", [None, 1], "whole numbers between 0 and 255"),
        ("FP16", [1, 2], "FP16 is sent as binary data"),
        ("BF16", [1, 2], "BF16 is sent as binary data"),
    ],
)
def test_json_data_that_are_no_such_tensor_are_refused(datatype: str, data: Any, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        numbers_from_json(form_of(datatype, (2,)), data)


def test_a_body_is_taken_apart_by_the_length_of_its_header() -> None:
    for length, header, binary in ((None, b"abcd", b""), ("0", b"", b"abcd"), ("3", b"abc", b"d"), ("4", b"abcd", b"")):
        parts = split_body(b"abcd", length)
        assert (bytes(parts.header), bytes(parts.binary)) == (header, binary)


@pytest.mark.parametrize("length", ["5", "-1", "", "x", "1.0", "1e0", "+1", "0x1", "9" * 12, "9" * 5000])
def test_a_length_that_cannot_be_is_refused(length: str) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length must be between 0 and the 4 bytes"):
        split_body(b"abcd", length)
