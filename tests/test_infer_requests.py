"""What one infer request may cost: pixels of all its rows together, and no more time than its SLO."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from serving import image_file

from web.errors import DeadlineExceeded, TooLarge
from web.infer_reading import Reading
from web.infer_requests import ModelForm, read_infer_request


@dataclass(frozen=True)
class Shape:
    height: int = 8
    width: int = 8
    channels: int = 3


FORM = ModelForm(
    name="tiny", version="1", input=Shape(), classes=5, most_rows=64, max_pixels=1_000_000, longest_slo_s=60.0
)


class Ticking:
    """A clock that goes on by a second whenever it is looked at."""

    def __init__(self) -> None:
        self._ticks: Iterator[int] = count()
        self.now_s = 0

    def __call__(self) -> float:
        self.now_s = next(self._ticks)
        return self.now_s


def reading(inline: bool = False, slo_s: float = 60.0) -> Reading:
    return Reading(clock=Ticking(), arrival_s=0.0, slo_s=slo_s, inline=inline)


def images(*files: bytes, outputs: Any = None, **parameters: Any) -> tuple[bytes, str]:
    """A body of encoded images, and the length of the JSON in front."""
    data = b"".join(struct.pack("<I", len(each)) + each for each in files)
    one = {"name": "input", "shape": [len(files)], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    text = json.dumps({"inputs": [one], "parameters": parameters, "outputs": outputs or []}).encode()
    return text + data, str(len(text))


SMALL = image_file("PNG", (10, 10))


def test_rows_after_the_deadline_are_not_decoded() -> None:
    patient = reading(slo_s=2.5)
    with pytest.raises(DeadlineExceeded, match="while the rows were decoded") as caught:
        read_infer_request(*images(*[SMALL] * 64), FORM, patient)
    assert caught.value.details == {"slo_ms": 2500.0}
    assert patient.clock() == 4, "looked at before the rows 0 to 3, of which the last was not decoded"


def test_an_slo_in_the_body_is_kept_to() -> None:
    with pytest.raises(DeadlineExceeded):
        read_infer_request(*images(*[SMALL] * 8, slo_ms=1500), FORM, reading())
    assert len(read_infer_request(*images(*[SMALL] * 8, slo_ms=20_000), FORM, reading(slo_s=1.5)).rows) == 8


@pytest.mark.parametrize("header_length", ["0", None])
def test_what_waited_beyond_its_deadline_is_not_decoded(header_length: str | None) -> None:
    late = Reading(clock=lambda: 5.0, arrival_s=0.0, slo_s=1.0, inline=False)
    one = {"name": "input", "shape": [1, 8, 8, 3], "datatype": "UINT8", "data": [0] * 192}
    body = SMALL if header_length else json.dumps({"inputs": [one]}).encode()
    with pytest.raises(DeadlineExceeded):
        read_infer_request(body, header_length, FORM, late)


@pytest.mark.parametrize(("inline", "most"), [(False, 1_000_000), (True, 65_536)])
def test_all_rows_share_the_pixels_of_one_request(inline: bool, most: int) -> None:
    side = int((most / 3) ** 0.5)
    file = image_file("PNG", (side, side))
    assert len(read_infer_request(*images(*[file] * 3), FORM, reading(inline)).rows) == 3
    with pytest.raises(TooLarge, match=rf"row 3 of 'input': .* at most {most} pixels are decoded for one request"):
        read_infer_request(*images(*[file] * 4), FORM, reading(inline))


@pytest.mark.parametrize(("asked", "named"), [(1, 1), (5, 5), (6, 5), (2**31, 5)])
def test_no_more_classes_are_named_than_there_are(asked: int, named: int) -> None:
    wanted = [{"name": "probabilities", "parameters": {"classification": asked}}]
    assert read_infer_request(*images(SMALL, outputs=wanted), FORM, reading()).classification == named
