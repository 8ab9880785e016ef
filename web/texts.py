"""From a request to one text: token ids and an attention mask, sent as such or made of a text by the tokenizer.

A text is int32 (2, tokens): ids, and 1 for those that are attended to. The server pads; a client need not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from web.errors import BadRequest, TooLarge, UnsupportedMedia
from web.json_values import array_of, brief

# Longer texts are tokenized on a thread: 4 KiB take a millisecond or two.
INLINE_TEXT_BYTES = 4 * 1024
# Of a longer one, nearly all would be cut off: a network reads some thousand tokens at most.
MOST_TEXT_BYTES = 256 * 1024

IDS, MASK, TYPES, TEXT = "input_ids", "attention_mask", "token_type_ids", "text"


class Encoder(Protocol):
    """Makes token ids of texts, as many as the network takes at most; web/tokenizer.py has one."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids, special ones included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextForm:
    """What a text servable takes, and how requests are read; without a tokenizer, ``missing`` says what it lacks."""

    length: int
    vocabulary: int
    tokenizer: Encoder | None
    missing: str = ""

    @property
    def least_bytes(self) -> int:
        """What any input takes."""
        return 8

    @property
    def accepted(self) -> str:
        """For errors and documents: what a body may be."""
        ids = f'{{"inputs": [ids…]}} or {{"inputs": {{"{IDS}": [ids…], "{MASK}": [0 or 1…]}}}} as application/json'
        return ids if self.tokenizer is None else f'{{"{TEXT}": "…"}} as application/json, a text as text/plain, {ids}'

    # ------------------------------------------------------------------------------------------------------- bodies

    def decode_inline(self, body: bytes, content_type: str) -> NDArray[np.int32] | None:
        """As ``decode``; None for what would take long."""
        return self.decode(body, content_type) if len(body) <= INLINE_TEXT_BYTES else None

    def decode(self, body: bytes, content_type: str) -> NDArray[np.int32]:
        """The text in a body; raises BadRequest, TooLarge or UnsupportedMedia, naming what is allowed."""
        if content_type not in ("application/json", "text/plain"):
            raise UnsupportedMedia(
                f"content type '{content_type:.80}' is not read here, this network takes texts; send {self.accepted}"
            )
        if not body:
            raise BadRequest(f"empty body; send {self.accepted}")
        if content_type == "text/plain":
            if self.tokenizer is None:
                raise UnsupportedMedia(f"texts are not read here, as {self.missing}; send {self.accepted}")
            return self.encode_bytes(body)
        return self._from_document(_parse(body, self.length))

    def _from_document(self, document: object) -> NDArray[np.int32]:
        if not isinstance(document, dict) or document.keys() not in ({TEXT}, {"inputs"}):
            found = f"the keys {', '.join(map(str, document))}" if isinstance(document, dict) else brief(document)
            raise BadRequest(f"found {found[:200]}; send {self.accepted}")
        return self.encode(document[TEXT]) if TEXT in document else self.check_lists(document["inputs"], '"inputs"')

    # -------------------------------------------------------------------------------------------------------- texts

    def encode_bytes(self, body: bytes) -> NDArray[np.int32]:
        """A text as UTF-8."""
        try:
            return self.encode(body.decode())
        except UnicodeDecodeError as error:
            raise BadRequest(f"the text is not UTF-8: {error}") from None

    def encode(self, text: object) -> NDArray[np.int32]:
        """A text, cut off at the greatest length by the tokenizer's own rule."""
        if not isinstance(text, str):
            raise BadRequest(f'"{TEXT}" must be a string, not {brief(text)}')
        if self.tokenizer is None:
            raise BadRequest(f"texts are not read here, as {self.missing}; send {self.accepted}")
        if not text.strip():
            raise BadRequest("an empty text")
        if len(text) > MOST_TEXT_BYTES:
            raise TooLarge(f"a text of {len(text)} characters; at most {MOST_TEXT_BYTES} are read")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text holds half of a surrogate pair, which is no character") from None
        ids = self.tokenizer.encode(text)
        if not len(ids):
            raise BadRequest("the tokenizer finds no token in the text")
        return np.stack([ids, np.ones_like(ids)])

    # ---------------------------------------------------------------------------------------------------------- ids

    def check(self, value: object) -> NDArray[np.int32]:
        """What is an input already: an array of ids, or of ids and mask, or a mapping of both; raises BadRequest."""
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim in (1, 2):
            if value.ndim == 1 or len(value) == 2:
                return self._checked(value if value.ndim == 1 else value[0], value[1] if value.ndim == 2 else None)
        elif isinstance(value, Mapping | list | tuple):
            return self.check_lists(value, "the input")
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise BadRequest(
            f"the input is {found}; expected int32 or int64 token ids (n,), or ids and attention mask (2, n), "
            f"n from 1 to {self.length}; or a text, or {IDS} and {MASK} by name"
        )

    def check_lists(self, value: object, what: str) -> NDArray[np.int32]:
        """Ids as a list, or lists (or arrays) by name; raises BadRequest."""
        if not isinstance(value, Mapping):
            return self._checked(_numbers(value, what), None)
        if not value.keys() <= {IDS, MASK, TYPES} or IDS not in value:
            raise BadRequest(f"{what} has the members {', '.join(map(str, value))[:200]}; expected {IDS}, maybe {MASK}")
        rows = {name: _numbers(each, name) for name, each in value.items()}
        if TYPES in rows and (rows[TYPES].shape != rows[IDS].shape or rows[TYPES].any()):
            raise BadRequest(f"{TYPES} must be zeros, as many as {IDS}: pairs of texts are not read")
        return self._checked(rows[IDS], rows.get(MASK))

    def _checked(self, ids: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[np.int32]:
        """Ids and mask as int32 (2, n), padding at the end left out."""
        if ids.ndim != 1 or (mask is not None and mask.shape != ids.shape):
            shapes = f"{list(ids.shape)}" + ("" if mask is None else f" and {list(mask.shape)}")
            raise BadRequest(f"token ids and attention mask must be two lists of one length, not of shape {shapes}")
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise BadRequest(f"{MASK} must hold 0 and 1 only")
        tokens = len(ids) if mask is None else int(np.max(np.flatnonzero(mask), initial=-1)) + 1
        if not tokens:
            why = "no token ids" if not len(ids) else f"{MASK} leaves no token"
            raise BadRequest(f"{why}; expected 1 to {self.length}")
        if tokens > self.length:
            raise BadRequest(f"{tokens} token ids; this network takes at most {self.length}")
        found = ids[:tokens]
        if not ((found >= 0) & (found < self.vocabulary) & (found == np.floor(found))).all():
            raise BadRequest(f"token ids must be whole numbers from 0 to {self.vocabulary - 1}")
        ones = np.ones(tokens) if mask is None else mask[:tokens]
        return np.stack([found, ones]).astype(np.int32)


def _numbers(value: object, what: str) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu":
            raise BadRequest(f"{what} is {value.dtype} {value.shape}; expected int32 or int64 (n,)")
        return value
    if not isinstance(value, list | tuple):
        raise BadRequest(f"{what} must be a list of numbers, not {type(value).__name__}")
    return array_of(list(value), what)


def _parse(body: bytes, length: int) -> object:
    """The JSON of a text or of ids; commas and brackets may be part of a text, so that only bytes are bounded."""
    most = MOST_TEXT_BYTES + 64 * length
    if len(body) > most:
        raise TooLarge(f"the body has {len(body)} bytes of JSON; at most {most} are read for a text")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
