"""A tokenizer file beside the weights is read, bounded and checked before it is used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fixtures_texts import SPECIAL, VOCABULARY, ids_of, write_tokenizer

from web.tokenizer import TokenizerError, find_tokenizer, load_tokenizer

pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
KNOWN = len(VOCABULARY)


def ids(path: Path, text: str, length: int = 40) -> list[int]:
    tokenizer = load_tokenizer(path, length, KNOWN)
    assert tokenizer is not None
    found: list[int] = tokenizer.encode(text).tolist()
    return found


def test_a_text_becomes_its_tokens_between_the_special_ones(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    assert ids(path, "The film was GOOD!") == ids_of("the film was good !")


def test_long_texts_are_cut_and_keep_their_special_tokens(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    assert ids(path, "the film was " + "good " * 100, length=6) == ids_of("the film was good")


def test_the_side_and_the_length_of_the_cut_are_the_tokenizers_own(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", max_length=5, direction="left")
    assert ids(path, "a plot, the film was good") == ids_of("film was good")
    assert ids(path, "a plot, the film was good", length=4) == ids_of("was good")


@pytest.mark.parametrize("cased", [False, True])
def test_a_vocabulary_alone_is_berts_tokenizer_with_or_without_capitals(tmp_path: Path, cased: bool) -> None:
    path = tmp_path / "vocab.txt"
    names = [*VOCABULARY[:-1], "Film" if cased else VOCABULARY[-1]]
    path.write_text("\n".join(names) + "\n")
    assert ids(path, "Film") == [2, names.index("Film" if cased else "film"), 3]


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("the\nfilm\n[CLS]\n")
    with pytest.raises(TokenizerError, match=r"vocab\.txt.*\[UNK\], \[SEP\] not among its 3 tokens"):
        load_tokenizer(path, 40, KNOWN)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"model": {}}', "\x00"])
def test_damaged_files_are_told_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no tokenizer: "):
        load_tokenizer(path, 40, KNOWN)


def test_files_that_are_no_text_are_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no tokenizer: "):
        load_tokenizer(path, 40, KNOWN)


def test_tokens_that_the_network_does_not_know_are_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=f"has {KNOWN} tokens, the network knows {KNOWN - 1}"):
        load_tokenizer(path, 40, KNOWN - 1)


def test_a_network_without_room_for_a_word_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="adds 2 special tokens to a text, which may have 2 tokens in all"):
        load_tokenizer(path, 2, KNOWN)


def test_without_the_package_there_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(path, 40, KNOWN) is None


def test_tokenizer_json_is_preferred_as_it_says_more(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL))
    assert find_tokenizer(tmp_path) == tmp_path / "vocab.txt"
    write_tokenizer(tmp_path / "tokenizer.json")
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
