"""The inputs of a text servable in an Open Inference Protocol infer request.

``input_ids`` and, where texts are padded, ``attention_mask``: INT64 or INT32 [rows, tokens]; or ``text``: BYTES
[rows, 1] or [rows], UTF-8. A row is a query, and is cut to its own length: what is masked at its end is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from web.errors import BadRequest, TooLarge
from web.infer_reading import Reading, each_row, members
from web.json_values import brief
from web.tensors import (
    TensorForm,
    bytes_from_binary,
    numbers_from_binary,
    numbers_from_json,
    read_form,
    texts_from_json,
)
from web.texts import IDS, INLINE_TEXT_BYTES, MASK, TEXT, TextForm

_INTEGERS = ("INT64", "INT32")


@dataclass(frozen=True, slots=True)
class SentTensor:
    """One input as it was sent: its form, and its JSON data or its binary data."""

    form: TensorForm
    data: object
    binary: memoryview | None

    def numbers(self) -> NDArray[Any]:
        """The integers."""
        if self.binary is not None:
            return numbers_from_binary(self.form, self.binary)
        return numbers_from_json(self.form, self.data)

    def texts(self) -> list[bytes] | list[str]:
        """The texts."""
        if self.binary is not None:
            return bytes_from_binary(self.form, self.binary)
        return texts_from_json(self.form, self.data)


def tensors_of(form: TextForm) -> list[TensorForm]:
    """The inputs that there are, as the metadata show them."""
    ids = [TensorForm(IDS, "INT64", (-1, -1)), TensorForm(MASK, "INT64", (-1, -1))]
    return ids if form.tokenizer is None else [*ids, TensorForm(TEXT, "BYTES", (-1, 1))]


def is_optional(form: TextForm, name: str) -> bool:
    """Whether a request can do without this input."""
    return name != IDS or form.tokenizer is not None


def describe_forms(form: TextForm) -> str:
    """For people: what can be sent."""
    ids = f"{IDS} and maybe {MASK}, INT64 or INT32 [-1, tokens], at most {form.length} of {form.vocabulary} tokens"
    return ids if form.tokenizer is None else f"{ids}; or {TEXT}, BYTES [-1, 1] or [-1], UTF-8"


def read_text_rows(
    inputs: object, binary: memoryview, form: TextForm, most_rows: int, reading: Reading
) -> tuple[NDArray[Any], ...]:
    """The queries in ``inputs``; raises BadRequest, or inline TooLarge for texts that would take long."""
    sent = _sent(inputs, binary, [each.name for each in tensors_of(form)])
    if TEXT in sent and len(sent) > 1:
        raise BadRequest(f"inputs have both '{TEXT}' and {' and '.join(sent.keys() - {TEXT})}; send one or the other")
    if TEXT not in sent and IDS not in sent:
        expected = f"'{IDS}'" if form.tokenizer is None else f"'{IDS}' or '{TEXT}'"
        raise BadRequest(f"inputs lack {expected}; forms: {describe_forms(form)}")
    for each in sent.values():
        _check_shape(each.form, most_rows)
    return _text_rows(sent[TEXT], form, reading) if TEXT in sent else _id_rows(sent, form, reading)


def _sent(inputs: object, binary: memoryview, known: list[str]) -> dict[str, SentTensor]:
    """The inputs by name; binary data of one follow those of the input before it."""
    if not isinstance(inputs, list) or not inputs:
        raise BadRequest(f"inputs must be a list of {', '.join(known)}, not {brief(inputs)}")
    found: dict[str, SentTensor] = {}
    for each in inputs:
        tensor = members(each, "inputs", ("name", "shape", "datatype", "parameters", "data"))
        form = read_form(tensor)
        if form.name not in known:
            raise BadRequest(f"unknown input '{form.name:.40}'; known: {', '.join(known)}")
        if form.name in found:
            raise BadRequest(f"the input '{form.name}' is there twice")
        size = _binary_size(tensor, form.name, len(binary))
        part, binary = (None, binary) if size is None else (binary[:size], binary[size:])
        found[form.name] = SentTensor(form, tensor.get("data"), part)
    if len(binary):
        raise BadRequest(f"{len(binary)} bytes of binary data are left over from the binary_data_size of all inputs")
    return found


def _binary_size(tensor: Mapping[str, Any], name: str, left: int) -> int | None:
    """How many of the bytes that are left are this input's; None where its data are JSON."""
    parameters = members(tensor.get("parameters", {}), f"parameters of '{name}'", ("binary_data_size",))
    if "binary_data_size" not in parameters:
        if "data" not in tensor:
            raise BadRequest(f"'{name}' has neither data nor binary_data_size")
        return None
    if "data" in tensor:
        raise BadRequest(f"'{name}' has both data and binary_data_size")
    size = parameters["binary_data_size"]
    if type(size) is not int or not 0 <= size <= left:
        raise BadRequest(f"binary_data_size of '{name}' is {brief(size)}; {left} bytes are there")
    return size


def _check_shape(form: TensorForm, most_rows: int) -> None:
    if form.name == TEXT:
        if form.datatype != "BYTES" or form.shape[1:] not in ((), (1,)) or not form.shape:
            raise BadRequest(f"{form.describe()} does not fit; expected BYTES [-1, 1] or [-1], -1 being the rows")
    elif form.datatype not in _INTEGERS or len(form.shape) != 2:
        raise BadRequest(f"{form.describe()} does not fit; expected INT64 or INT32 [-1, tokens], -1 being the rows")
    if not 1 <= form.shape[0] <= most_rows:
        raise BadRequest(f"a request has 1 to {most_rows} rows, not {form.shape[0]}")


def _text_rows(sent: SentTensor, form: TextForm, reading: Reading) -> tuple[NDArray[Any], ...]:
    texts = sent.texts()
    if reading.inline and sum(map(len, texts)) > INLINE_TEXT_BYTES:
        raise TooLarge("tokenizing these texts takes long")
    make = lambda text: form.encode(text) if isinstance(text, str) else form.encode_bytes(text)  # noqa: E731
    return each_row(make, texts, TEXT, reading)


def _id_rows(sent: Mapping[str, SentTensor], form: TextForm, reading: Reading) -> tuple[NDArray[Any], ...]:
    if MASK in sent and sent[MASK].form.shape != sent[IDS].form.shape:
        shapes = [list(sent[name].form.shape) for name in (IDS, MASK)]
        raise BadRequest(f"'{IDS}' has the shape {shapes[0]}, '{MASK}' {shapes[1]}; they must agree")
    rows = [{name: row} for name in (IDS,) for row in sent[IDS].numbers()]
    if MASK in sent:
        for row, mask in zip(rows, sent[MASK].numbers(), strict=True):
            row[MASK] = mask
    return each_row(lambda row: form.check_lists(row, "the row"), rows, IDS, reading)
