"""Text servables: what requests may hold, and what a real server answers to them."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fixtures_texts import (
    LABELS,
    LARGEST,
    LENGTH,
    VOCABULARY,
    ids_of,
    plain_probabilities,
    predictions,
    tokens,
    write_text_servable,
    write_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from serving import PATIENT_MS, Served, config_of, process
from test_live import browsing
from test_openapi import schemathesis_of

import startup
from servable import load_servable
from supernet import SupernetError
from superserve import SERVE, SuperServe, make_app
from web.errors import BadRequest, ServeError, TooLarge, UnsupportedMedia
from web.texts import INLINE_TEXT_BYTES, MOST_TEXT_BYTES, TextForm

Client = TestClient[web.Request, web.Application]
FILM = ids_of("the film was good")
JSON = "application/json"


class Letters:
    """Makes a token of each character."""

    def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array([ord(each) % 90 for each in text][:LENGTH], np.int32)


class Deaf(Letters):
    """Finds no token in any text."""

    def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array([], np.int32)


FORM = TextForm(length=LENGTH, vocabulary=90, tokenizer=Letters())
IDS_ONLY = TextForm(length=LENGTH, vocabulary=90, tokenizer=None, missing="nothing lies there")


def read(document: object, form: TextForm = FORM) -> list[list[int]]:
    found: list[list[int]] = form.decode(json.dumps(document).encode(), JSON).tolist()
    return found


# ----------------------------------------------------------------------------------------------------------- one input


def test_texts_are_served_in_float32_only(tmp_path: Path) -> None:
    with pytest.raises(SupernetError, match=r"supernet\.json: texts are computed in float32 only, not in bfloat16"):
        load_servable(write_text_servable(tmp_path), "bfloat16")


def test_ids_are_read_in_all_spellings() -> None:
    ids, ones = [2, 5, 3], [1, 1, 1]
    assert read({"inputs": ids}) == [ids, ones]
    assert read({"inputs": {"input_ids": ids}}) == [ids, ones]
    assert read({"inputs": {"input_ids": ids, "attention_mask": [1, 0, 1]}}) == [ids, [1, 0, 1]]
    assert read({"inputs": {"input_ids": ids, "attention_mask": ones, "token_type_ids": [0, 0, 0]}}) == [ids, ones]
    for array in (np.array(ids), np.array(ids, np.int32), np.array([ids, ones]), tokens(*ids)):
        assert FORM.check(array).tolist() == [ids, ones]
    assert FORM.check({"input_ids": np.array(ids), "attention_mask": ones}).tolist() == [ids, ones]
    assert FORM.check(tuple(ids)).tolist() == [ids, ones]


@given(st.lists(st.integers(0, 89), min_size=1, max_size=LENGTH), st.integers(0, 200))
def test_padding_at_the_end_is_left_out(ids: list[int], padding: int) -> None:
    mask = [1] * len(ids) + [0] * padding
    found = read({"inputs": {"input_ids": ids + [0] * padding, "attention_mask": mask}})
    assert found == [ids, [1] * len(ids)]


def test_texts_are_read_as_json_and_as_they_are() -> None:
    expected = FORM.encode("good").tolist()
    assert read({"text": "good"}) == FORM.decode(b"good", "text/plain").tolist() == expected
    assert FORM.decode("für".encode(), "text/plain").shape == (2, 3)
    assert read({"text": "," * 9000 + "[" * 9000}) == [[44] * LENGTH, [1] * LENGTH], "marks of JSON, but of the text"


WRONG: dict[str, tuple[object, str]] = {
    "no object": ([1], "found a list; send"),
    "no key": ({}, "found the keys ; send"),
    "another key": ({"image": []}, "found the keys image; send"),
    "two keys": ({"text": "a", "inputs": [1]}, "found the keys text, inputs; send"),
    "no text": ({"text": 3}, '"text" must be a string, not 3'),
    "an empty text": ({"text": " \n"}, "an empty text"),
    "half a pair": ({"text": "\ud800"}, "half of a surrogate pair"),
    "no ids": ({"inputs": []}, "no token ids; expected 1 to 40"),
    "too many ids": ({"inputs": [1] * 41}, "41 token ids; this network takes at most 40"),
    "an unknown id": ({"inputs": [1, 90]}, "token ids must be whole numbers from 0 to 89"),
    "a negative id": ({"inputs": [-1]}, "token ids must be whole numbers from 0 to 89"),
    "half an id": ({"inputs": [1.5]}, "token ids must be whole numbers from 0 to 89"),
    "a huge id": ({"inputs": [1e308]}, "token ids must be whole numbers from 0 to 89"),
    "null": ({"inputs": [None]}, "token ids must be whole numbers from 0 to 89"),
    "true": ({"inputs": [True]}, "true, false and texts are none"),
    "words": ({"inputs": ["a"]}, "no tensor of numbers"),
    "rows": ({"inputs": [[1, 2]]}, r"two lists of one length, not of shape \[1, 2\]"),
    "a number": ({"inputs": 3}, '"inputs" must be a list of numbers, not int'),
    "no input_ids": ({"inputs": {"attention_mask": [1]}}, "has the members attention_mask; expected input_ids"),
    "an unknown member": ({"inputs": {"input_ids": [1], "ids": [1]}}, "has the members input_ids, ids; expected"),
    "two lengths": (
        {"inputs": {"input_ids": [1, 2], "attention_mask": [1]}}, r"of one length, not of shape \[2\] and \[1\]"
    ),
    "a mask of 2": ({"inputs": {"input_ids": [1], "attention_mask": [2]}}, "must hold 0 and 1 only"),
    "a mask of 0": ({"inputs": {"input_ids": [1, 1], "attention_mask": [0, 0]}}, "attention_mask leaves no token"),
    "types": ({"inputs": {"input_ids": [1], "token_type_ids": [1]}}, "pairs of texts are not read"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_with_what_is_allowed(wrong: str) -> None:
    document, message = WRONG[wrong]
    with pytest.raises(BadRequest, match=message):
        read(document)


@pytest.mark.parametrize("body", [b"", b"{", b'{"text": "\xff"}', b"[" * 10_000])
def test_bodies_that_are_no_json_are_told(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"empty body; send|the body is not JSON"):
        FORM.decode(body, JSON)


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((3, 3), np.int64), np.zeros((1, 2, 3), np.int32), 5, None, b"x", np.array("x")]
)
def test_other_arrays_are_told_what_is_expected(array: object) -> None:
    with pytest.raises(BadRequest, match=r"the input is .*; expected int32 or int64 token ids \(n,\)"):
        FORM.check(array)


def test_arrays_that_are_no_integers_are_told_by_name() -> None:
    with pytest.raises(BadRequest, match=r"input_ids is float64 \(3,\); expected int32 or int64"):
        FORM.check({"input_ids": np.zeros(3)})


def test_texts_that_are_too_long_to_be_read_are_refused() -> None:
    with pytest.raises(TooLarge, match=f"at most {MOST_TEXT_BYTES} are read"):
        FORM.decode(b"a" * (MOST_TEXT_BYTES + 1), "text/plain")
    with pytest.raises(TooLarge, match="bytes of JSON"):
        FORM.decode(b'{"text": "' + b"a" * 2 * MOST_TEXT_BYTES + b'"}', JSON)


def test_long_texts_are_not_tokenized_while_others_wait() -> None:
    assert FORM.decode_inline(b"a" * INLINE_TEXT_BYTES, "text/plain") is not None
    assert FORM.decode_inline(b"a" * (INLINE_TEXT_BYTES + 1), "text/plain") is None


def test_a_text_without_a_token_is_refused() -> None:
    with pytest.raises(BadRequest, match="the tokenizer finds no token"):
        TextForm(length=9, vocabulary=9, tokenizer=Deaf()).encode("?")


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "", "text/html"])
def test_other_types_of_content_are_told_what_is_read(content_type: str) -> None:
    with pytest.raises(UnsupportedMedia, match=r'this network takes texts; send \{"text": "…"\} as application/json'):
        FORM.decode(b"abc", content_type)


def test_without_a_tokenizer_it_is_said_what_is_missing() -> None:
    assert read({"inputs": [1, 2]}, IDS_ONLY) == [[1, 2], [1, 1]]
    with pytest.raises(BadRequest, match="texts are not read here, as nothing lies there; send"):
        read({"text": "good"}, IDS_ONLY)
    with pytest.raises(UnsupportedMedia, match="texts are not read here, as nothing lies there; send"):
        IDS_ONLY.decode(b"good", "text/plain")
    with pytest.raises(UnsupportedMedia) as caught:
        IDS_ONLY.decode(b"good", "image/png")
    assert "text/plain" not in str(caught.value)


@given(st.binary(max_size=60), st.sampled_from([JSON, "text/plain", "image/png"]))
def test_any_body_is_an_input_or_an_error_for_the_client(body: bytes, content_type: str) -> None:
    for form in (FORM, IDS_ONLY):
        try:
            found = form.decode(body, content_type)
        except ServeError as error:
            told = str(error)
        else:
            assert found.dtype == np.int32
            assert found.shape[0] == 2
            assert 1 <= found.shape[1] <= LENGTH
            told = ""
        assert len(told) < 500


# ------------------------------------------------------------------------------------------------------- a real server

served = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a latency table, which the first server has measured."""
    folder = write_text_servable(tmp_path_factory.mktemp("texts"))

    async def start() -> None:
        async with SuperServe(config_of(folder)):
            pass

    asyncio.run(start())
    return folder


@pytest.fixture
async def texts(folder: Path) -> AsyncIterator[Client]:
    app = make_app(config_of(folder))
    async with TestClient(TestServer(app)) as client:
        await app[SERVE].start_soon()
        yield client


async def post(client: Client, data: object, content_type: str = JSON, query: str = "?top_k=3") -> dict[str, float]:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    async with client.post(f"/predict{query}", data=body, headers={"Content-Type": content_type}) as response:
        text = await response.text()
        assert response.status == 200, text
        return predictions(text)


@served
async def test_a_text_is_answered_as_the_plain_network_does(texts: Client, folder: Path) -> None:
    expected = plain_probabilities(folder, LARGEST, FILM)
    for data, kind in (
        ({"text": "The film was good"}, JSON), (b"the film was good", "text/plain"), ({"inputs": FILM}, JSON),
        ({"inputs": {"input_ids": [*FILM, 0, 0], "attention_mask": [1] * len(FILM) + [0, 0]}}, JSON),
    ):  # fmt: skip
        found = await post(texts, data, kind, "?top_k=3&min_accuracy=0.8")
        np.testing.assert_allclose([found[label] for label in LABELS], expected, rtol=1e-3)  # four digits are told


@served
async def test_many_texts_of_many_lengths_at_once_get_each_its_own_answer(texts: Client, folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, len(VOCABULARY), 1 + number % LENGTH).tolist() for number in range(60)]
    found = await asyncio.gather(*(post(texts, {"inputs": row}, JSON, "?top_k=3&min_accuracy=0.8") for row in rows))
    for row, answer in zip(rows, found, strict=True):
        expected = plain_probabilities(folder, LARGEST, row)
        np.testing.assert_allclose([answer[label] for label in LABELS], expected, rtol=2e-3, atol=1e-6)


@served
async def test_broken_queries_do_not_harm_those_beside_them(texts: Client, folder: Path) -> None:
    async def wrong(document: object) -> int:
        async with texts.post("/predict", json=document) as response:
            assert (await response.json())["error"]
            return response.status

    documents = [document for document, _ in WRONG.values() if document != {"text": "\ud800"}]
    async with asyncio.TaskGroup() as tasks:
        statuses = [tasks.create_task(wrong(document)) for document in documents]
        good = [tasks.create_task(post(texts, {"inputs": FILM}, JSON, "?top_k=3&min_accuracy=0.8")) for _ in range(20)]
    # 89 is the last token of the form above; the served network has fewer.
    assert {each.result() for each in statuses} == {400}
    expected = plain_probabilities(folder, LARGEST, FILM)
    for each in good:
        np.testing.assert_allclose([each.result()[label] for label in LABELS], expected, rtol=1e-3)


@served
async def test_long_texts_are_cut_and_tokenized_aside(texts: Client, folder: Path) -> None:
    words = "good film , " * 2000
    assert len(words) > INLINE_TEXT_BYTES
    found = await post(texts, {"text": words}, JSON, "?top_k=3&min_accuracy=0.8")
    cut = ids_of(" ".join(words.split()[: LENGTH - 2]))
    expected = plain_probabilities(folder, LARGEST, cut)
    np.testing.assert_allclose([found[label] for label in LABELS], expected, rtol=1e-3)


@served
@pytest.mark.parametrize("content_type", ["image/jpeg", "application/octet-stream", ""])
async def test_images_are_not_read_by_a_text_servable(texts: Client, content_type: str) -> None:
    async with texts.post("/predict", data=b"\xff\xd8\xff", headers={"Content-Type": content_type}) as response:
        assert response.status == 415
        assert '{"text": "…"} as application/json' in (await response.json())["error"]


async def test_texts_are_not_read_by_an_image_servable(client: Client) -> None:
    async with client.post("/predict", data="good", headers={"Content-Type": "text/plain"}) as response:
        assert response.status == 415
        assert "send image/*, application/octet-stream or application/json" in (await response.json())["error"]
    async with client.post("/predict", json={"text": "good"}) as response:
        assert response.status == 400
        assert 'the one key "inputs"; found keys text' in (await response.json())["error"]


@served
async def test_texts_come_over_a_stream(texts: Client, folder: Path) -> None:
    ids = np.array(FILM, "<i8")
    both = np.array([FILM, [1] * len(FILM)], "<i4")
    messages = {
        "json": ({"content_type": JSON}, json.dumps({"text": "the film was good"}).encode()),
        "plain": ({"content_type": "text/plain; charset=utf-8"}, b"the film was good"),
        "ids": ({"dtype": "int64", "shape": [len(FILM)]}, ids.tobytes()),
        "both": ({"dtype": "int32", "shape": [2, len(FILM)]}, both.tobytes()),
        "long": ({"content_type": "text/plain"}, b"the film was good " + b" " * INLINE_TEXT_BYTES),
        "floats": ({"dtype": "float32", "shape": [1]}, b"\0\0\0\0"),
        "untyped": ({}, b"the film was good"),
    }
    found: dict[str, Any] = {}
    async with texts.ws_connect("/stream") as socket:
        for name, (fields, payload) in messages.items():
            header = json.dumps({"id": name, "top_k": 3, "min_accuracy": 0.8, **fields}).encode()
            await socket.send_bytes(struct.pack("<I", len(header)) + header + payload)
        for _ in messages:
            reply = await socket.receive_json(timeout=30)
            found[reply["id"]] = reply
    expected = plain_probabilities(folder, LARGEST, FILM)
    for name in ("json", "plain", "ids", "both", "long"):
        answer = predictions(json.dumps(found[name]))
        np.testing.assert_allclose([answer[label] for label in LABELS], expected, rtol=1e-3)
    assert found["floats"]["status"] == 400
    assert "the input is float32 (1,); expected int32 or int64" in found["floats"]["error"]
    assert found["untyped"]["status"] == 415


@served
async def test_embedding_takes_texts_ids_and_both_by_name(folder: Path) -> None:
    expected = plain_probabilities(folder, LARGEST, FILM)
    long = np.array([[*FILM, 9], [1] * len(FILM) + [0]])
    given = ("the film was good", np.array(FILM), {"input_ids": FILM}, long, "the film was good" + " " * 9000)
    async with SuperServe(config_of(folder)) as serve:
        for each in given:
            reply = await serve.infer(each, min_accuracy=0.8)
            np.testing.assert_allclose(reply.probabilities, expected, atol=1e-5)
        with pytest.raises(BadRequest, match="the text is not UTF-8"):
            await serve.infer("\ud800")
        with pytest.raises(UnsupportedMedia, match="this network takes texts"):
            await serve.infer(b"\xff\xd8\xff")
        with pytest.raises(BadRequest, match="the input is int; expected"):
            await serve.infer(3)


async def test_embedding_an_image_servable_refuses_texts(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as serve:
        with pytest.raises(UnsupportedMedia, match="content type 'text/plain' is not read here; send image"):
            await serve.infer("good")


@served
async def test_the_document_describes_texts(texts: Client) -> None:
    async with texts.get("/openapi.json") as response:
        document = await response.json()
    body = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert body.keys() == {JSON, "text/plain"}
    by_text, by_ids = document["components"]["schemas"]["Inputs"]["oneOf"]
    assert by_text["required"] == ["text"]
    ids, by_name = by_ids["properties"]["inputs"]["anyOf"]
    assert (ids["maxItems"], ids["items"]["maximum"]) == (LENGTH, len(VOCABULARY) - 1)
    assert by_name["required"] == ["input_ids"]


# ------------------------------------------------------------------------------------------------- without a tokenizer


@served
async def test_ids_are_served_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write_text_servable(tmp_path, with_tokenizer=False)
    app = make_app(config_of(folder))
    async with TestClient(TestServer(app)) as client:
        await app[SERVE].start_soon()
        await post(client, {"inputs": FILM})
        for data, kind, status in (('{"text": "good"}', JSON, 400), ("good", "text/plain", 415)):
            async with client.post("/predict", data=data, headers={"Content-Type": kind}) as response:
                assert response.status == status
                message = "as no tokenizer.json or vocab.txt lies beside the weights"
                assert message in (await response.json())["error"]
        async with client.get("/openapi.json") as response:
            document = await response.json()
        assert document["paths"]["/predict"]["post"]["requestBody"]["content"].keys() == {JSON}
        assert "oneOf" not in document["components"]["schemas"]["Inputs"]


def test_the_check_says_what_texts_lack(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [each for each in startup.check(config_of(folder)) if each.level == "error"]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (lack,) = [each for each in startup.check(config_of(folder)) if "texts are not read" in each.text]
    assert lack.level == "warning"
    assert "pip install tokenizers" in lack.text


@served
def test_a_tokenizer_of_another_network_ends_the_start(tmp_path: Path) -> None:
    folder = write_text_servable(tmp_path)
    write_tokenizer(folder / "tokenizer.json", vocabulary=(*VOCABULARY, "more"))
    wrong = [each.text for each in startup.check(config_of(folder)) if each.level == "error"]
    assert len(wrong) == 1
    known = len(VOCABULARY)
    assert wrong[0].endswith(f"tokenizer.json has {known + 1} tokens, the network knows {known}")


@served
def test_the_command_serves_texts(folder: Path) -> None:
    url, replies = f"/predict?slo_ms={PATIENT_MS}&min_accuracy=0.8&top_k=3", []
    sent = {JSON: b'{"text": "the film was good"}', "text/plain; charset=utf-8": b"the film was good"}
    with process(folder) as running:
        for content_type, body in sent.items():
            asked = urllib.request.Request(running.url + url, body, {"Content-Type": content_type})
            with urllib.request.urlopen(asked, timeout=60) as response:
                replies.append(predictions(response.read()))
        wrong = urllib.request.Request(running.url + url, b"{}", {"Content-Type": JSON})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(wrong, timeout=60)
        assert caught.value.code == 400
        caught.value.close()
    expected = plain_probabilities(folder, LARGEST, FILM)
    for reply in replies:
        np.testing.assert_allclose([reply[label] for label in LABELS], expected, rtol=1e-3)
    assert "no tokenizer" not in running.named()


# ------------------------------------------------------------------------------------------- the document and the page


@served
def test_schemathesis_finds_nothing_that_the_document_does_not_say(folder: Path, tmp_path: Path) -> None:
    with Served(folder) as running:
        found = schemathesis_of(running.url, tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


@served
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_the_page_has_a_field_for_texts(folder: Path, tmp_path: Path, kind: str) -> None:
    folder = folder if kind == "text" else write_text_servable(tmp_path, with_tokenizer=False)
    with Served(folder) as running, browsing(running.url) as (page, complaints):
        field = page.locator("#text")
        field.wait_for()
        assert page.locator("#drop").is_hidden()
        assert page.locator("#send").is_disabled()
        field.fill("the film was good" if kind == "text" else ", ".join(map(str, FILM)))
        for slider in ("#slo", "#floor"):
            page.locator(slider).focus()
            page.keyboard.press("End")
        page.locator("#send").click()
        page.locator("#answer .facts").wait_for()
        assert LARGEST in page.locator("#answer").inner_text()
        assert page.locator("#answer .classes tr").count() == 3
        assert complaints == []
