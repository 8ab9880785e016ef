"""The body of an Open Inference Protocol infer request: read and checked as a whole, into rows and wishes.

Images are one input, ``input``, in one of three forms: UINT8 [rows, height, width, channels], pixels; FP32 (FP16, BF16)
[rows, channels, height, width], normalised; BYTES [rows], encoded images. infer_texts.py reads texts. Each row is one
query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from web.errors import BadRequest
from web.infer_reading import Reading, each_row, members
from web.infer_texts import read_text_rows
from web.inputs import INLINE_PIXELS, ImageShape, PixelBudget, check_array, decode, decode_image, number, whole_number
from web.json_values import brief, parse_json
from web.tensors import (
    TensorForm,
    bytes_from_binary,
    numbers_from_binary,
    numbers_from_json,
    read_form,
    split_body,
)
from web.texts import MOST_TEXT_BYTES, TEXT, TextForm

INPUT, OUTPUT = "input", "probabilities"
# What a request of many rows may cost before the queries of others get their turn.
MOST_ROWS = 64
PRIORITIES = 101

_REQUEST = ("id", "model_name", "model_version", "parameters", "inputs", "outputs")
_PARAMETERS = ("slo_ms", "timeout", "priority", "min_accuracy", "members", "binary_data_output")
_NORMALISED = ("FP32", "FP16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForm:
    """What the body of a request must fit."""

    name: str
    version: str
    input: ImageShape | TextForm
    classes: int
    most_rows: int
    max_pixels: int
    longest_slo_s: float

    @property
    def most_values(self) -> int:
        """How many numbers a request can hold."""
        if isinstance(self.input, TextForm):  # ids and mask, or texts, whose commas are counted as well
            return max(2 * self.most_rows * self.input.length, MOST_TEXT_BYTES // 16)
        return self.most_rows * self.input.height * self.input.width * self.input.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """What a client asks: ``texts`` are its parameters as ``parse_parameters`` reads them.

    ``classification`` is how many classes per row are to be named; 0 asks for all probabilities.
    """

    id: str | None
    texts: Mapping[str, str]
    rows: tuple[NDArray[Any], ...]
    binary: bool
    classification: int


def read_infer_request(body: bytes, header_length: str | None, form: ModelForm, reading: Reading) -> InferRequest:
    """Read a body; inline, raises TooLarge for images that would take long. Raises a ServeError."""
    if header_length == "0":
        return _read_raw(body, form, reading)
    parts = split_body(body, header_length)
    values = 0 if len(parts.binary) else form.most_values  # they are either in the JSON, or binary behind it
    hint = "; binary data need the header Inference-Header-Content-Length"
    request = members(parse_json(parts.header, values, "the request", hint), "the request", _REQUEST)
    _check_model(request, form)
    parameters = members(request.get("parameters", {}), "parameters", _PARAMETERS)
    output = _read_output(request.get("outputs"))
    binary_by_default = _flag(parameters, "binary_data_output", False)
    texts = _texts(parameters, form.longest_slo_s)
    slo_ms = number("slo_ms", texts.get("slo_ms"), reading.slo_s * 1e3, 0, form.longest_slo_s * 1e3)
    return InferRequest(
        id=_text(request.get("id"), "id"),
        texts=texts,
        rows=_read_rows(request.get("inputs"), parts.binary, form, replace(reading, slo_s=slo_ms / 1e3)),
        binary=_flag(output, "binary_data", binary_by_default),
        classification=_classes(output, form.classes),
    )


def _read_raw(body: bytes, form: ModelForm, reading: Reading) -> InferRequest:
    """A body that is one input and nothing else, in any form that /predict reads; answered in binary."""
    reading.check_deadline()
    if isinstance(form.input, TextForm):
        (row,) = each_row(form.input.encode_bytes, [body], TEXT, reading)
    else:
        row = decode(body, "application/octet-stream", form.input, _max_pixels(form, reading))
    return InferRequest(id=None, texts={}, rows=(row,), binary=True, classification=0)


# ------------------------------------------------------------------------------------------------- members, parameters


def _text(value: object, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{name} must be a string, not {brief(value)}")
    return value


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, not {brief(value)}")
    return value


def _check_model(request: Mapping[str, Any], form: ModelForm) -> None:
    for name, expected in (("model_name", form.name), ("model_version", form.version)):
        if _text(request.get(name), name) not in (None, "", expected):
            raise BadRequest(f"{name} is {brief(request[name])}, but the request was sent to '{expected}'")


def _texts(parameters: Mapping[str, Any], longest_slo_s: float) -> dict[str, str]:
    """Parameters by the names, in the units and with the meaning that /predict gives them."""
    numbers = parameters.keys() - {"binary_data_output", "members"}
    texts = {name: _number_text(name, value) for name, value in parameters.items() if name in numbers}
    if "members" in parameters:
        texts["members"] = _text(parameters["members"], "members") or ""
    if "priority" in texts:  # 0 is the default; 1 is the most urgent here, and the least above 0 there
        level = whole_number("priority", texts["priority"], 0, 0, PRIORITIES)
        texts["priority"] = str(PRIORITIES - level if level else 0)
    if "timeout" in texts:
        timeout_us = whole_number("timeout", texts.pop("timeout"), 0, 1, round(longest_slo_s * 1e6))
        slo_ms = repr(timeout_us / 1e3)
        if float(texts.setdefault("slo_ms", slo_ms)) != float(slo_ms):
            raise BadRequest(f"slo_ms is {texts['slo_ms']}, but timeout says {slo_ms} ms; give one of them")
    return texts


def _number_text(name: str, value: object) -> str:
    if type(value) not in (int, float):
        raise BadRequest(f"{name} must be a number, not {brief(value)}")
    return repr(value)


# ------------------------------------------------------------------------------------------------------ output, input


def _read_output(outputs: object) -> dict[str, Any]:
    """The parameters of the one output that can be asked for; it is also what is sent when none is."""
    if outputs is None or outputs == []:
        return {}
    if not isinstance(outputs, list):
        raise BadRequest(f"outputs must be a list, not {brief(outputs)}")
    for output in outputs:
        name = members(output, "outputs", ("name", "parameters")).get("name")
        if name != OUTPUT:
            raise BadRequest(f"unknown output {brief(name)}; known: {OUTPUT}")
    if len(outputs) > 1:
        raise BadRequest(f"the output '{OUTPUT}' is asked for {len(outputs)} times")
    return members(outputs[0].get("parameters", {}), f"parameters of '{OUTPUT}'", ("binary_data", "classification"))


def _classes(output: Mapping[str, Any], classes: int) -> int:
    """How many classes are to be named; all of them if more are asked for, as Triton has it."""
    if "classification" not in output:
        return 0
    text = _number_text("classification", output["classification"])
    return min(whole_number("classification", text, 0, 1, 2**31), classes)


def _read_rows(inputs: object, binary: memoryview, form: ModelForm, reading: Reading) -> tuple[NDArray[Any], ...]:
    if isinstance(form.input, TextForm):
        return read_text_rows(inputs, binary, form.input, form.most_rows, reading)
    if not isinstance(inputs, list) or len(inputs) != 1:
        found = f"{len(inputs)} of them" if isinstance(inputs, list) else brief(inputs)
        raise BadRequest(f"inputs must be a list of the one input '{INPUT}', not {found}")
    sent = members(inputs[0], "inputs", ("name", "shape", "datatype", "parameters", "data"))
    tensor = read_form(sent)
    if tensor.name != INPUT:
        raise BadRequest(f"unknown input '{tensor.name:.40}'; known: {INPUT}")
    _check_form(tensor, form.input, form.most_rows)
    parameters = members(sent.get("parameters", {}), f"parameters of '{INPUT}'", ("binary_data_size",))
    if "binary_data_size" not in parameters:
        if len(binary):
            raise BadRequest(f"{len(binary)} bytes of binary data, but no input has a binary_data_size")
        return _rows_of_json(tensor, sent.get("data"), form.input, reading)
    if "data" in sent:
        raise BadRequest(f"'{INPUT}' has both data and binary_data_size")
    size = parameters["binary_data_size"]
    if type(size) is not int or size != len(binary):
        raise BadRequest(f"binary_data_size of '{INPUT}' is {brief(size)}; {len(binary)} bytes were sent")
    budget = PixelBudget(_max_pixels(form, reading))
    return _rows_of_binary(tensor, binary, form.input, budget, reading)


def _check_form(tensor: TensorForm, shape: ImageShape, most_rows: int) -> None:
    height, width, channels = shape.height, shape.width, shape.channels
    shapes = {"UINT8": (height, width, channels), **dict.fromkeys(_NORMALISED, (channels, height, width)), "BYTES": ()}
    if tensor.datatype not in shapes:
        raise BadRequest(f"'{INPUT}' cannot be {tensor.datatype}; accepted: {', '.join(shapes)}")
    if not tensor.shape or tensor.shape[1:] != shapes[tensor.datatype]:
        expected = [-1, *shapes[tensor.datatype]]
        raise BadRequest(f"{tensor.describe()} does not fit; expected {expected}, -1 being the number of rows")
    if not 1 <= tensor.shape[0] <= most_rows:
        raise BadRequest(f"a request has 1 to {most_rows} rows, not {tensor.shape[0]}")


def _rows_of_json(tensor: TensorForm, data: object, shape: ImageShape, reading: Reading) -> tuple[NDArray[Any], ...]:
    if data is None:
        raise BadRequest(f"'{INPUT}' has neither data nor binary_data_size")
    if tensor.datatype == "BYTES":
        raise BadRequest(f"{tensor.describe()}: encoded images are sent as binary data; JSON strings hold text")
    return each_row(lambda row: check_array(row, shape), numbers_from_json(tensor, data), INPUT, reading)


def _rows_of_binary(
    tensor: TensorForm, data: memoryview, shape: ImageShape, budget: PixelBudget, reading: Reading
) -> tuple[NDArray[Any], ...]:
    if tensor.datatype != "BYTES":
        return each_row(lambda row: check_array(row, shape), numbers_from_binary(tensor, data), INPUT, reading)
    images = bytes_from_binary(tensor, data)
    return each_row(lambda image: decode_image(image, shape, budget), images, INPUT, reading)


def _max_pixels(form: ModelForm, reading: Reading) -> int:
    """How many pixels of images are decoded for a request, all its rows together."""
    return min(INLINE_PIXELS, form.max_pixels) if reading.inline else form.max_pixels
