"""Answers are encoded row by row, to the same JSON as all at once, and the large ones are told apart."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from web.infer_answers import INLINE_VALUES, encode_answer, is_quick, reply_parameters
from web.infer_requests import InferRequest, ModelForm

CLASSES = ("ant", "bee", 'a "cat"]}]}')
ASKED = InferRequest(id='"data": []}]}', texts={}, rows=(), binary=False, classification=0)


@dataclass(frozen=True)
class Shape:
    height: int = 8
    width: int = 8
    channels: int = 3


@dataclass(frozen=True)
class Served:
    """The answer to one row."""

    probabilities: NDArray[np.float32]
    subnet: str = "s"
    accuracy: float = 0.5
    slo_s: float = 1.0
    latency_s: float = 0.5
    queue_s: float = 0.25
    deadline_met: bool = True
    degraded: bool = False
    batch_size: int = field(default=1)


FORM = ModelForm(name="n", version="1", input=Shape(), classes=3, most_rows=64, max_pixels=10, longest_slo_s=1.0)
ROWS = np.random.default_rng(0).random((4, 3), np.float32)


def document_of(rows: NDArray[np.float32], **asked: Any) -> dict[str, Any]:
    answer = encode_answer(replace(ASKED, **asked), [Served(row) for row in rows], FORM, CLASSES)
    assert answer.header_bytes is None
    found: dict[str, Any] = json.loads(answer.body)
    return found


@pytest.mark.parametrize("rows", [1, 4])
def test_numbers_come_back_exactly_row_by_row(rows: int) -> None:
    document = document_of(ROWS[:rows])
    assert document["id"] == ASKED.id
    (output,) = document["outputs"]
    assert (output["shape"], output["datatype"]) == ([rows, 3], "FP32")
    assert np.array_equal(np.array(output["data"], np.float32), ROWS[:rows].ravel())


def test_labels_of_any_kind_come_back() -> None:
    (output,) = document_of(ROWS, classification=3)["outputs"]
    assert output["shape"] == [4, 3]
    assert {text.split(":", 2)[2] for text in output["data"]} == set(CLASSES)
    assert len(output["data"]) == 12


def test_only_text_of_many_values_is_not_quick() -> None:
    binary = replace(ASKED, binary=True)
    assert is_quick(ASKED, 1, INLINE_VALUES)
    assert not is_quick(ASKED, 2, INLINE_VALUES)
    assert is_quick(binary, 64, INLINE_VALUES)
    assert not is_quick(replace(binary, classification=1), 64, INLINE_VALUES)


def test_a_row_without_a_member_that_failed_makes_the_answer_degraded() -> None:
    rows = [Served(ROWS[0]), Served(ROWS[1], degraded=True)]
    assert reply_parameters(rows)["degraded"] is True
    assert "degraded" not in reply_parameters(rows[:1])
