"""What clients are told of a query that was answered, as JSON that is written by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from web.replies import Prediction, Reply

ROW = np.zeros(2, np.float32)


def reply(**settings: Any) -> Reply:
    given: dict[str, Any] = {
        "predictions": (Prediction(label="cat", index=3, probability=0.97),), "subnet": "d2-e1", "accuracy": 0.912,
        "batch_size": 8, "slo_s": 0.05, "latency_s": 0.0123, "queue_s": 0.0041, "deadline_met": True,
    }  # fmt: skip
    return Reply(**{**given, **settings}, probabilities=ROW)


def test_a_subnet_s_reply_says_what_the_design_says() -> None:
    assert json.loads(reply().json()) == {
        "predictions": [{"label": "cat", "index": 3, "probability": 0.97}], "subnet": "d2-e1", "accuracy": 0.912,
        "batch_size": 8, "slo_ms": 50, "latency_ms": 12.3, "queue_ms": 4.1, "deadline_met": True,
    }  # fmt: skip


def test_an_ensemble_s_reply_names_its_members_and_whether_some_failed() -> None:
    whole = json.loads(reply(subnet="a+b+c").json())
    assert (whole["subnet"], whole["members"]) == ("a+b+c", ["a", "b", "c"])
    assert "degraded" not in whole
    assert reply(subnet="a+b").members == ("a", "b")
    assert reply(subnet="a").members == ()
    rest = json.loads(reply(subnet="a", degraded=True).json())
    assert rest["degraded"] is True
    assert "members" not in rest


@given(st.text(), st.text(min_size=1), st.floats(0, 1), st.floats(1e-6, 1e4), st.booleans(), st.booleans())
def test_every_reply_is_json_and_true_to_six_digits(
    label: str, subnet: str, accuracy: float, seconds: float, met: bool, degraded: bool
) -> None:
    predictions = (Prediction(label=label, index=0, probability=accuracy),)
    found = json.loads(
        reply(
            predictions=predictions, subnet=subnet, accuracy=accuracy, slo_s=seconds, latency_s=seconds,
            deadline_met=met, degraded=degraded,
        ).json()
    )  # fmt: skip
    assert (found["subnet"], found["predictions"][0]["label"], found["deadline_met"]) == (subnet, label, met)
    assert abs(found["latency_ms"] - seconds * 1e3) <= seconds * 1e3 * 1e-5
    assert abs(found["accuracy"] - accuracy) <= accuracy * 1e-3 + 1e-12
    assert found.get("degraded", False) == degraded
