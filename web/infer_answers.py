"""The answer to an Open Inference Protocol infer request: one output tensor as JSON or binary, and its compression.

Large answers are encoded on a thread. So that it lets others have the interpreter, rows become JSON one by one.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from web.infer_requests import OUTPUT, InferRequest, ModelForm
from web.serving import Reply
from web.tensors import bytes_to_binary, floats_to_binary

FAST = 1  # the level of compression: answers are wanted soon
# An answer of more values takes milliseconds to encode as text.
INLINE_VALUES = 4096


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """A body; the JSON is its first ``header_bytes`` where binary data follow, else (None) all of it."""

    body: bytes
    header_bytes: int | None


def is_quick(asked: InferRequest, rows: int, classes: int) -> bool:
    """Whether encoding so many rows holds up nobody: as binary numbers they are only copied."""
    return rows * classes <= INLINE_VALUES or (asked.binary and not asked.classification)


def encode_answer(
    asked: InferRequest, replies: Sequence[Reply], form: ModelForm, classes: Sequence[str]
) -> EncodedAnswer:
    """The answer to all rows, in order, in the form that was asked for."""
    values: NDArray[Any] = np.stack([reply.probabilities for reply in replies])
    if asked.classification:
        values = classification(values, classes, asked.classification)
    output: dict[str, Any] = {
        "name": OUTPUT,
        "datatype": "BYTES" if asked.classification else "FP32",
        "shape": list(values.shape),
    }
    data = b""
    if asked.binary:
        data = _to_binary(values)
        output["parameters"] = {"binary_data_size": len(data)}
    else:
        output["data"] = []
    document = {"model_name": form.name, "model_version": form.version}
    if asked.id is not None:
        document["id"] = asked.id
    header = json.dumps(document | {"parameters": reply_parameters(replies), "outputs": [output]})
    if not asked.binary:
        return EncodedAnswer(_with_data(header, values).encode(), None)
    return EncodedAnswer(header.encode() + data, len(header))


def _with_data(text: str, values: NDArray[Any]) -> str:
    """Put the values into the empty list of data with which the document ends."""
    end = "]}]}"
    assert text.endswith(f'"data": [{end}'), "data are what comes last"
    return text.removesuffix(end) + ", ".join(json.dumps(row.tolist())[1:-1] for row in values) + end


def _to_binary(values: NDArray[Any]) -> bytes:
    if values.dtype == np.float32:
        return floats_to_binary(values)
    return bytes_to_binary([text.encode() for text in values.ravel()])


def classification(probabilities: NDArray[np.float32], classes: Sequence[str], count: int) -> NDArray[np.object_]:
    """The likeliest classes of each row, the best first, each as ``probability:index:label``."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    texts = [
        [f"{row[index]:f}:{index}:{classes[index]}" for index in order]
        for row, order in zip(probabilities, best, strict=True)
    ]
    return np.array(texts, np.object_)


def reply_parameters(replies: Sequence[Reply]) -> dict[str, str | float | bool]:
    """How the rows were served; scalars, as the protocol has no lists here: the longest times, the mean accuracy."""
    return {
        "subnet": ",".join(dict.fromkeys(reply.subnet for reply in replies)),
        "accuracy": round(sum(reply.accuracy for reply in replies) / len(replies), 4),
        "slo_ms": round(replies[0].slo_s * 1e3, 3),
        "latency_ms": round(max(reply.latency_s for reply in replies) * 1e3, 3),
        "queue_ms": round(max(reply.queue_s for reply in replies) * 1e3, 3),
        "deadline_met": all(reply.deadline_met for reply in replies),
        **({"degraded": True} if any(reply.degraded for reply in replies) else {}),
    }


# --------------------------------------------------------------------------------------------------------- compression


def accepted_encoding(header: str) -> str:
    """What an Accept-Encoding header likes best of gzip, deflate and identity; the first of equals."""
    best, weight = "identity", 0.0
    for part in header.split(","):
        name, _, parameter = part.partition(";")
        found = _weight(parameter)
        if name.strip().lower() in ("gzip", "deflate", "identity") and found > weight:
            best, weight = name.strip().lower(), found
    return best


def _weight(parameter: str) -> float:
    name, _, value = parameter.partition("=")
    if name.strip().lower() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0


def compress(body: bytes, encoding: str) -> bytes:
    """The body as gzip or, in zlib's wrapper, deflate."""
    return gzip.compress(body, FAST, mtime=0) if encoding == "gzip" else zlib.compress(body, FAST)
