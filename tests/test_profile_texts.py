"""A text servable is measured on labelled texts, as the server computes them, and can be served then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fixtures_texts import (
    LABELS,
    LARGEST,
    LENGTH,
    SMALLEST,
    VOCABULARY,
    WORDS,
    import_text_servable,
    plain_probabilities,
    write_tokenizer,
)
from serving import config_of, write_servable

import slackfit
import startup
from scripts import profile_supernet, profile_texts
from scripts.profile_texts import DataError, read_texts, subnets_of
from servable import load_servable
from superserve import SuperServe
from web.texts import TextForm


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    return import_text_servable(folder, tokenizer=write_tokenizer(folder / "given.json"))


def form_of(folder: Path) -> TextForm:
    form = startup.input_form(config_of(folder), load_servable(folder))
    assert isinstance(form, TextForm)
    return form


def labelled(folder: Path, count: int) -> list[dict[str, object]]:
    """Texts with the classes that the largest subnet finds."""
    rng, form = np.random.default_rng(0), form_of(folder)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        text = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
        ids = form.encode(text)[0].tolist()
        rows.append({"text": text, "label": LABELS[int(plain_probabilities(folder, LARGEST, ids).argmax())]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
async def test_an_imported_checkpoint_is_measured_and_then_served(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "dev.jsonl", labelled(imported, 40))
    arguments = ["--profile", str(imported), "--data", str(data), "--rounds", "2", "--device", "cpu", "--threads", "1"]
    await run_aside(arguments)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["calibrated"] == len(load_servable(imported).supernet.space) == 12
    found = {each.name: each for each in slackfit.load_choices(imported)}
    assert found[LARGEST].accuracy == 1.0, "it made the labels"
    assert found[LARGEST].accuracy_samples == 20
    assert found[SMALLEST].accuracy < 1.0
    assert found[SMALLEST].macs < found[LARGEST].macs
    assert found[SMALLEST].frontier
    assert found[LARGEST].frontier
    findings = startup.check(config_of(imported))
    assert [each.level for each in findings] == ["ok"], findings
    async with SuperServe(config_of(imported)) as serve:
        reply = await serve.infer("the film was good", min_accuracy=1.0)
    assert reply.accuracy == 1.0


async def run_aside(arguments: list[str]) -> None:
    """The script has an event loop of its own."""
    import asyncio

    await asyncio.to_thread(profile_texts.main, arguments)


def test_all_subnets_are_looked_at_or_the_ends_and_some(imported: Path) -> None:
    servable = load_servable(imported)
    assert len(subnets_of(servable, 60, 0)) == 12
    some = [subnet.name for subnet in subnets_of(servable, 4, 0)]
    assert len(some) == len(set(some)) == 4
    assert {SMALLEST, LARGEST} <= set(some)


def test_both_forms_of_data_say_the_same(imported: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f'"good" film {n}', "label": n % 3} for n in range(5)]
    as_lines = write_jsonl(tmp_path / "dev.jsonl", rows)
    as_table = tmp_path / "dev.tsv"
    lines = [f"{row['text']}\t{LABELS[int(str(row['label']))]}" for row in rows]
    as_table.write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    form = form_of(imported)
    ids = [{"input_ids": form.encode(row["text"])[0].tolist(), "label": row["label"]} for row in rows]
    read = [
        read_texts(path, form, LABELS) for path in (as_lines, as_table, write_jsonl(tmp_path / "ids.jsonl", ids))
    ]
    for each in read:
        assert each.labels.tolist() == [0, 1, 2, 0, 1]
        for one, other in zip(each.inputs, read[0].inputs, strict=True):
            np.testing.assert_array_equal(one, other)
    assert all(each.shape[1] <= LENGTH for each in read[0].inputs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a", "label": "good"}\n', "row 1: label 'good'; known: negative, neutral, positive"),
        ("d.jsonl", '{"text": "a"}\n', "row 1: label 'None'; known"),
        ("d.jsonl", '{"text": "a", "label": 0}\n{"text"\n', "line 2: "),
        ("d.jsonl", "[1]\n", "line 1: expected an object"),
        ("d.jsonl", '{"text": "", "label": 0}\n', "row 1: an empty text"),
        ("d.jsonl", '{"label": 0}\n', "row 1: the row has the members ; expected input_ids"),
        ("d.jsonl", '{"text": "a", "label": 0}\n', "1 texts; at least 4 are needed"),
        ("d.tsv", "a\tb\n1\t2\n", "row 1: the row has the members ; expected input_ids"),
        ("d.csv", "", r"expected a \.jsonl or a \.tsv file"),
        ("d.jsonl", b"\xff\n", "codec can't decode"),
    ],
)
def test_data_that_cannot_be_read_are_told_by_place(
    imported: Path, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_texts(path, form_of(imported), LABELS)


@pytest.mark.parametrize("what", ["images", "no file", "no data", "no tokens"])
def test_what_cannot_be_measured_ends_in_one_line(imported: Path, tmp_path: Path, what: str) -> None:
    profile, data = imported, tmp_path / "dev.jsonl"
    if what == "images":
        profile, message = write_servable(tmp_path / "tiny"), "takes images; scripts/profile_supernet.py measures those"
    elif what == "no file":
        profile, message = tmp_path / "nothing", "supernet.json"
    elif what == "no tokens":
        write_jsonl(data, [{"text": "a", "label": 0}] * 4)
        profile, message = import_text_servable(tmp_path / "bare"), "row 1: texts are not read here, as no tokenizer"
    else:
        message = "dev.jsonl"
    with pytest.raises(SystemExit) as caught:
        profile_texts.main(["--profile", str(profile), "--data", str(data), "--device", "cpu"])
    assert str(caught.value.code).startswith("profile_texts.py: ")
    assert message in str(caught.value.code)


def test_texts_are_not_measured_as_images(imported: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        profile_supernet.main(["--profile", str(imported), "--data", "digits", "--device", "cpu"])
    assert str(caught.value.code).endswith("takes texts; scripts/profile_texts.py measures those")


# ------------------------------------------------------------------------------------------- straight from the import


@pytest.mark.slow
async def test_with_a_known_accuracy_the_largest_subnet_is_served_at_once(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "given.json")
    folder = import_text_servable(tmp_path, "--accuracy", "0.91", "872", tokenizer=tokenizer)
    (only,) = slackfit.load_choices(folder)
    assert (only.name, only.accuracy, only.accuracy_samples) == (LARGEST, 0.91, 872)
    assert only.parameters == sum(each.numel() for each in load_servable(folder).supernet.network.parameters())
    async with SuperServe(config_of(folder)) as serve:
        assert (await serve.infer("good")).subnet == LARGEST


@pytest.mark.parametrize("accuracy", [("1.5", "10"), ("0.5", "0"), ("0.5", "1.5"), ("nan", "3"), ("x", "3")])
def test_an_accuracy_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, accuracy: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        import_text_servable(tmp_path, "--accuracy", *accuracy)
    assert "--accuracy" in str(caught.value.code)
    assert not (tmp_path / "tinybert" / "weights.npz").exists()


def test_a_tokenizer_of_another_network_is_not_imported(tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other.json", vocabulary=(*VOCABULARY, "more"))
    with pytest.raises(SystemExit) as caught:
        import_text_servable(tmp_path, tokenizer=other)
    assert "the network knows" in str(caught.value.code)


def test_an_imported_tokenizer_takes_the_place_of_another_kind(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nfilm\n")
    first = import_text_servable(tmp_path, tokenizer=write_tokenizer(tmp_path / "given.json"))
    assert (first / "tokenizer.json").is_file()
    second = import_text_servable(tmp_path, tokenizer=vocabulary)
    assert (second / "vocab.txt").is_file()
    assert not (second / "tokenizer.json").exists()
    assert form_of(second).encode("film").tolist() == [[2, 4, 3], [1, 1, 1]]
