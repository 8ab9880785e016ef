"""Texts over the Open Inference Protocol, as an unmodified tritonclient and plain HTTP send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.http as triton
from fixtures_texts import LARGEST, LENGTH, VOCABULARY, ids_of, plain_probabilities, write_text_servable
from hypothesis import given
from hypothesis import strategies as st
from serving import Served
from tritonclient.utils import InferenceServerException

from web.errors import BadRequest, DeadlineExceeded, TooLarge
from web.infer_reading import Reading
from web.infer_texts import read_text_rows
from web.texts import INLINE_TEXT_BYTES, TextForm

pytestmark = pytest.mark.slow

TEXTS = ("the film was good", "bad", "a very very great plot , is not poor !")
ROWS = [ids_of(text) for text in TEXTS]
WIDTH = max(map(len, ROWS))
IDS = np.array([row + [0] * (WIDTH - len(row)) for row in ROWS])
MASK = np.array([[1] * len(row) + [0] * (WIDTH - len(row)) for row in ROWS])
FLOOR = {"min_accuracy": 0.8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_servable(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with Served(folder) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray[Any, Any]:
    return np.stack([plain_probabilities(folder, LARGEST, row) for row in ROWS])


def sent(name: str, datatype: str, array: np.ndarray[Any, Any], *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("datatype", "dtype"), [("INT64", np.int64), ("INT32", np.int32)])
def test_ids_and_masks_are_answered_row_by_row(
    client: triton.InferenceServerClient, expected: Any, datatype: str, dtype: Any, binary: bool
) -> None:
    inputs = [
        sent("input_ids", datatype, IDS.astype(dtype), binary=binary),
        sent("attention_mask", datatype, MASK.astype(dtype), binary=binary),
    ]
    for order in (inputs, inputs[::-1]):
        result = client.infer("tinybert", order, parameters=FLOOR)
        np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-5)


def test_one_may_be_binary_and_the_other_json(client: triton.InferenceServerClient, expected: Any) -> None:
    inputs = [sent("input_ids", "INT64", IDS, binary=False), sent("attention_mask", "INT64", MASK)]
    result = client.infer("tinybert", inputs, parameters=FLOOR)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-5)


def test_ids_alone_are_all_attended_to(client: triton.InferenceServerClient, expected: Any) -> None:
    result = client.infer("tinybert", [sent("input_ids", "INT64", IDS[2:])], parameters=FLOOR)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected[2:], atol=1e-5)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_texts_are_tokenized(
    client: triton.InferenceServerClient, expected: Any, binary: bool, shape: tuple[int, ...]
) -> None:
    texts = np.array(TEXTS, np.object_).reshape(shape)
    result = client.infer("tinybert", [sent("text", "BYTES", texts, binary=binary)], parameters=FLOOR)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-5)
    named = triton.InferRequestedOutput("probabilities", class_count=1)
    result = client.infer("tinybert", [sent("text", "BYTES", texts, binary=binary)], outputs=[named], parameters=FLOOR)
    labels = [each[0].decode().split(":")[1] for each in result.as_numpy("probabilities")]
    assert labels == [str(row.argmax()) for row in expected]


def test_long_texts_are_tokenized_aside_and_cut(client: triton.InferenceServerClient, folder: Path) -> None:
    texts = np.array(["good film " * INLINE_TEXT_BYTES, "bad"], np.object_)
    result = client.infer("tinybert", [sent("text", "BYTES", texts)], parameters=FLOOR)
    cut = ids_of("good film " * ((LENGTH - 2) // 2))
    found = result.as_numpy("probabilities")
    np.testing.assert_allclose(found[0], plain_probabilities(folder, LARGEST, cut), atol=1e-5)
    np.testing.assert_allclose(found[1], plain_probabilities(folder, LARGEST, ids_of("bad")), atol=1e-5)


def test_metadata_and_configuration_show_all_inputs(client: triton.InferenceServerClient) -> None:
    metadata, config = client.get_model_metadata("tinybert"), client.get_model_config("tinybert")
    assert metadata["inputs"] == [
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "attention_mask", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "text", "datatype": "BYTES", "shape": [-1, 1]},
    ]
    assert [(each["data_type"], each["dims"], each["optional"]) for each in config["input"]] == [
        ("TYPE_INT64", [-1], True), ("TYPE_INT64", [-1], True), ("TYPE_STRING", [1], True),
    ]  # fmt: skip
    forms = config["parameters"]["input_forms"]["string_value"]
    assert f"at most {LENGTH} of {len(VOCABULARY)} tokens; or text, BYTES" in forms


def test_without_a_tokenizer_ids_are_needed_and_texts_unknown(tmp_path: Path) -> None:
    with Served(write_text_servable(tmp_path, with_tokenizer=False)) as server:
        client = triton.InferenceServerClient(server.url.removeprefix("http://"))
        names = [each["name"] for each in client.get_model_metadata("tinybert")["inputs"]]
        assert names == ["input_ids", "attention_mask"]
        config = client.get_model_config("tinybert")
        assert [each["optional"] for each in config["input"]] == [False, True]
        with pytest.raises(InferenceServerException, match="unknown input 'text'; known: input_ids, attention_mask"):
            client.infer("tinybert", [sent("text", "BYTES", np.array(["good"], np.object_))])
        client.close()


async def test_a_raw_body_is_a_text(server: Served, expected: Any) -> None:
    url = f"{server.url}/v2/models/tinybert/infer?min_accuracy=0.8"
    headers = {"Inference-Header-Content-Length": "0"}
    async with aiohttp.ClientSession() as session, session.post(url, data=TEXTS[0], headers=headers) as response:
        assert response.status == 200, await response.text()
        body, length = await response.read(), int(response.headers["Inference-Header-Content-Length"])
    np.testing.assert_allclose(np.frombuffer(body[length:], "<f4"), expected[0], atol=1e-5)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": ([], "inputs must be a list of input_ids, attention_mask, text, not a list"),
    "another name": ([("ids", "INT64", [1, 2], [1, 2])], "unknown input 'ids'; known: input_ids, attention_mask, text"),
    "twice": ([("input_ids", "INT64", [1, 1], [1])] * 2, "the input 'input_ids' is there twice"),
    "both": ([("input_ids", "INT64", [1, 1], [1]), ("text", "BYTES", [1], ["a"])], "both 'text' and input_ids"),
    "mask alone": ([("attention_mask", "INT64", [1, 1], [1])], "inputs lack 'input_ids' or 'text'; forms: input_ids"),
    "floats": ([("input_ids", "FP32", [1, 2], [1, 2])], "does not fit; expected INT64 or INT32"),
    "flat": ([("input_ids", "INT64", [2], [1, 2])], "does not fit; expected INT64 or INT32"),
    "text as ids": ([("text", "INT64", [1, 2], [1, 2])], "does not fit; expected BYTES"),
    "wide texts": ([("text", "BYTES", [1, 2], ["a", "b"])], "does not fit; expected BYTES"),
    "no rows": ([("input_ids", "INT64", [0, 2], [])], "a request has 1 to 64 rows, not 0"),
    "many rows": ([("text", "BYTES", [65], ["a"] * 65)], "a request has 1 to 64 rows, not 65"),
    "too many tokens": ([("input_ids", "INT64", [1, 41], [1] * 41)], "row 0 of 'input_ids': 41 token ids; this"),
    "unknown token": ([("input_ids", "INT64", [2, 1], [1, 99])], "row 1 of 'input_ids': token ids must be whole"),
    "half a token": ([("input_ids", "INT64", [1, 1], [0.5])], "must be whole numbers of 32 bits"),
    "no numbers": ([("input_ids", "INT64", [1, 1], ["a"])], "no tensor of numbers"),
    "fewer": ([("input_ids", "INT64", [2, 2], [1, 2, 3])], "the data of 'input_ids' as INT64"),
    "shapes": (
        [("input_ids", "INT64", [1, 2], [1, 2]), ("attention_mask", "INT64", [1, 1], [1])],
        "'input_ids' has the shape [1, 2], 'attention_mask' [1, 1]; they must agree",
    ),
    "masked": (
        [("input_ids", "INT64", [2, 1], [1, 1]), ("attention_mask", "INT64", [2, 1], [1, 0])],
        "row 1 of 'input_ids': attention_mask leaves no token",
    ),
    "empty text": ([("text", "BYTES", [2], ["a", ""])], "row 1 of 'text': an empty text"),
    "number as text": ([("text", "BYTES", [1], [5])], "must be strings, not 5"),
    "text count": ([("text", "BYTES", [2], ["a"])], "are 1 strings"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_is_wrong_is_named_and_harms_nobody(server: Served, wrong: str) -> None:
    tensors, message = WRONG[wrong]
    inputs = [dict(zip(("name", "datatype", "shape", "data"), each, strict=True)) for each in tensors]
    url = f"{server.url}/v2/models/tinybert/infer"
    good = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["good"]}]
    async with aiohttp.ClientSession() as session:
        async with session.post(url, json={"inputs": inputs}) as response:
            assert response.status == 400
            assert message in (await response.json())["error"]
        async with session.post(url, json={"inputs": good}) as response:
            assert response.status == 200


def head(**sizes: int) -> bytes:
    forms = {"input_ids": ("INT64", [1, 2]), "attention_mask": ("INT64", [1, 2]), "text": ("BYTES", [1])}
    inputs = [
        {"name": name, "datatype": forms[name][0], "shape": forms[name][1], "parameters": {"binary_data_size": size}}
        for name, size in sizes.items()
    ]
    return json.dumps({"inputs": inputs}).encode()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (head(input_ids=16), bytes(8), "binary_data_size of 'input_ids' is 16; 8 bytes are there"),
        (head(input_ids=16), bytes(24), "8 bytes of binary data are left over"),
        (head(input_ids=8), bytes(8), "'input_ids' as INT64 [1, 2] has 16 bytes; 8 were sent"),
        (head(input_ids=16, attention_mask=16), bytes(16), "binary_data_size of 'attention_mask' is 16; 0 bytes are"),
        (head(input_ids=-1), bytes(8), "binary_data_size of 'input_ids' is -1"),
        (head(text=4), b"\x05\0\0\0", "element 0 of 'text' as BYTES [1] has 5 bytes; only 0 were sent"),
        (head(text=5), b"\x01\0\0\0\xff", "row 0 of 'text': the text is not UTF-8"),
    ],
)
async def test_binary_data_must_fit_the_inputs(server: Served, header: bytes, data: bytes, message: str) -> None:
    url, headers = f"{server.url}/v2/models/tinybert/infer", {"Inference-Header-Content-Length": str(len(header))}
    async with aiohttp.ClientSession() as session, session.post(url, data=header + data, headers=headers) as response:
        assert response.status == 400
        assert message in (await response.json())["error"]


def test_tokenizing_stops_at_the_deadline_and_is_never_long_inline() -> None:
    class Slow:
        def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
            nonlocal now_s
            now_s += 1.0
            return np.array([1], np.int32)

    now_s = 0.0
    form = TextForm(length=9, vocabulary=9, tokenizer=Slow())
    texts = [{"name": "text", "datatype": "BYTES", "shape": [5], "data": ["a" * 2000] * 5}]
    reading = Reading(clock=lambda: now_s, arrival_s=0.0, slo_s=2.5, inline=False)
    with pytest.raises(DeadlineExceeded):
        read_text_rows(texts, memoryview(b""), form, 64, reading)
    assert now_s == 3.0
    inline = Reading(clock=lambda: now_s, arrival_s=0.0, slo_s=2.5, inline=True)
    with pytest.raises(TooLarge):
        read_text_rows(texts, memoryview(b""), form, 64, inline)
    assert now_s == 3.0
    with pytest.raises(BadRequest, match="neither data nor binary_data_size"):
        read_text_rows([{"name": "text", "datatype": "BYTES", "shape": [5]}], memoryview(b""), form, 64, inline)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {"name": st.sampled_from(["input_ids", "attention_mask", "text"]) | JSON},
    optional={
        "datatype": st.sampled_from(["INT64", "INT32", "BYTES", "FP32"]) | JSON,
        "shape": st.lists(st.integers(0, 4), min_size=1, max_size=2) | JSON,
        "data": st.lists(st.integers(-1, 12) | st.text(max_size=3), max_size=5) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(0, 32) | JSON}),
    },
)


@given(st.lists(TENSOR, max_size=3) | JSON, st.binary(max_size=40))
def test_any_inputs_are_rows_or_an_error_for_the_client(inputs: Any, binary: bytes) -> None:
    class Lengths:
        def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
            return np.array([len(text) % 9], np.int32)

    form = TextForm(length=9, vocabulary=9, tokenizer=Lengths())
    reading = Reading(clock=lambda: 0.0, arrival_s=0.0, slo_s=1.0, inline=True)
    try:
        rows = read_text_rows(inputs, memoryview(binary), form, 64, reading)
    except BadRequest as error:
        told = str(error)
    else:
        told = ""
        assert rows
        for row in rows:
            assert row.dtype == np.int32
            assert row.shape[0] == 2
            assert 1 <= row.shape[1] <= 9
    assert len(told) < 1000
