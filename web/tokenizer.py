"""The tokenizer that lies beside a servable's weights; the package ``tokenizers`` reads it, where it is installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILES = ("tokenizer.json", "vocab.txt")
NO_PACKAGE = "the package tokenizers is not installed here (pip install tokenizers)"
# The package would start threads of its own, one for each core, to split a single text over.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; says which and why."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Makes token ids of a text: at most so many, cut off as the tokenizer cuts."""

    tokenizer: Any  # of the package

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids, special ones included. May be called on any thread, and lets others run meanwhile."""
        return np.array(self.tokenizer.encode(text).ids, np.int32)


def find_tokenizer(folder: Path) -> Path | None:
    """The file in a servable's folder; None where there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def load_tokenizer(path: Path, length: int, vocabulary: int) -> Tokenizer | None:
    """The tokenizer of a tokenizer.json or vocab.txt, for networks of so many tokens; None without the package.

    Texts are cut on the side, and by the rule, that the file states (else on the right), leaving room for the special
    tokens; to its greatest length, if that is less. Padding that it states is not done here. Raises TokenizerError.
    """
    try:
        import tokenizers  # an optional dependency
    except ImportError:
        return None
    try:
        content = path.read_text(encoding="utf-8")
        read = _of_vocabulary(content) if path.suffix == ".txt" else tokenizers.Tokenizer.from_str(content)
        known = read.get_vocab(with_added_tokens=True)
    except Exception as error:  # the package raises no more particular class
        raise TokenizerError(f"{path}: no tokenizer: {error}") from error
    if not known or max(known.values()) >= vocabulary:
        most = max(known.values(), default=-1) + 1
        raise TokenizerError(f"{path} has {most} tokens, the network knows {vocabulary}")
    special = read.num_special_tokens_to_add(False)
    stated = read.truncation or {}
    most = min(length, stated.get("max_length", length))
    if special >= most:
        raise TokenizerError(f"{path}: adds {special} special tokens to a text, which may have {most} tokens in all")
    how = {name: stated[name] for name in ("direction", "strategy") if name in stated}
    read.no_padding()
    read.enable_truncation(most, **how)
    return Tokenizer(read)


def _of_vocabulary(content: str) -> Any:
    """BERT's tokenizer, as for its files that hold a token a line; one without any capital letter has read none."""
    from tokenizers import BertWordPieceTokenizer

    vocabulary = {token: number for number, token in enumerate(content.removesuffix("\n").split("\n"))}
    cased = any(token != token.lower() for token in vocabulary if not token.startswith("["))
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise TokenizerError(f"{', '.join(missing)} not among its {len(vocabulary)} tokens")
    return BertWordPieceTokenizer(vocabulary, lowercase=not cased)._tokenizer
