"""The mechanism's benchmark runs on the device that it is told."""

from __future__ import annotations

import pytest
from fixtures_supernet import SPACE, tiny_servable

from engine import EngineError
from scripts.bench_supernet import equality, switching


@pytest.mark.slow
def test_an_actuated_subnet_is_compared_where_it_was_switched() -> None:
    servable = tiny_servable()
    found = switching(servable, 0, "cpu")
    assert (found["device"]["kind"], found["subnets"]) == ("cpu", len(list(SPACE)))  # type: ignore[index]
    compared = equality(servable, 0, subnets=2)
    assert compared["compared"] == 2
    assert max(compared["largest_difference"], compared["largest_difference_two_threads"]) < 1e-4  # type: ignore[call-overload]


def test_a_device_that_is_not_there_is_no_cpu() -> None:
    with pytest.raises(EngineError, match="cuda:9"):
        switching(tiny_servable(()), 0, "cuda:9")
