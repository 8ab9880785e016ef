"""However a client's bytes are cut, the same messages come of them; what breaks the protocol is told by its code."""

import itertools
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web.frames import (
    BAD_TEXT,
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    PROTOCOL_ERROR,
    TEXT,
    TOO_BIG,
    FrameError,
    Frames,
    close_frame,
    frame,
)

MOST = 100_000
MASK = b"\x01\x80\xfe\x33"


def masked(opcode: int, payload: bytes = b"", *, final: bool = True, mask: bytes | None = MASK, bits: int = 0) -> bytes:
    """A frame as a client sends it."""
    size, flag = len(payload), 0 if mask is None else 0x80
    if size < 126:
        length = struct.pack(">B", flag | size)
    elif size < 2**16:
        length = struct.pack(">BH", flag | 126, size)
    else:
        length = struct.pack(">BQ", flag | 127, size)
    hidden = payload if mask is None else bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes((0x80 * final | bits | opcode,)) + length + (mask or b"") + hidden


def read(frames: Frames, pieces: Iterable[bytes]) -> list[tuple[int, bytes]]:
    found = []
    for piece in pieces:
        frames.feed(piece)
        found += [(kind, bytes(payload)) for kind, payload in frames.messages()]
    return found


CONTROLS = st.tuples(st.sampled_from([PING, PONG]), st.binary(max_size=125))
WHOLE = st.tuples(st.just(BINARY), st.binary(max_size=300)) | st.tuples(st.just(TEXT), st.text(max_size=60))


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, bytes]]]:
    """What a client may send, and what it means: messages in fragments, and control frames among these."""
    sent, meant = bytearray(), []
    for kind, content in draw(st.lists(WHOLE, max_size=6)):
        payload = content.encode("utf-8", "replace") if isinstance(content, str) else content
        cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
        ends = [0, *cuts, len(payload)]
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            mask = draw(st.binary(min_size=4, max_size=4))
            opcode = CONTINUATION if number else kind
            sent += masked(opcode, payload[start:end], final=number == len(ends) - 2, mask=mask)
            if number < len(ends) - 2:
                controls = draw(st.lists(CONTROLS, max_size=1))
                sent += b"".join(masked(*control) for control in controls)
                meant += controls
        meant.append((kind, payload))
    return bytes(sent), meant


@given(streams(), st.data())
def test_the_same_messages_come_of_a_stream_however_it_is_cut(
    stream: tuple[bytes, list[tuple[int, bytes]]], data: st.DataObject
) -> None:
    sent, meant = stream
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=9))), len(sent)]
    pieces = [sent[start:end] for start, end in itertools.pairwise(cuts)]
    assert read(Frames(MOST), [sent]) == meant
    assert read(Frames(MOST), pieces) == meant
    assert read(Frames(MOST), (sent[index : index + 1] for index in range(len(sent)))) == meant


@pytest.mark.parametrize("size", [0, 1, 3, 125, 126, 127, 2**16 - 1, 2**16, MOST])
def test_every_length_is_read_and_written(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    sent = masked(BINARY, payload[:size])
    assert read(Frames(MOST), [sent, sent[:5], sent[5:]]) == [(BINARY, payload[:size])] * 2
    assert frame(TEXT, payload[:size]) == masked(TEXT, payload[:size], mask=None)


def test_who_stops_in_between_goes_on_where_it_stopped() -> None:
    frames = Frames(MOST)
    frames.feed(b"".join(masked(BINARY, bytes((number,))) for number in range(5)) + masked(BINARY, b"rest")[:7])
    assert next(frames.messages()) == (BINARY, b"\0")
    frames.feed(masked(BINARY, b"rest")[7:])
    assert next(frames.messages()) == (BINARY, b"\1")
    assert [bytes(payload) for _, payload in frames.messages()] == [b"\2", b"\3", b"\4", b"rest"]


BROKEN = {
    "not masked": (masked(BINARY, b"x", mask=None), PROTOCOL_ERROR),
    "reserved bit": (masked(BINARY, b"x", bits=0x40), PROTOCOL_ERROR),
    "opcode 3": (masked(3), PROTOCOL_ERROR),
    "opcode 11": (masked(11), PROTOCOL_ERROR),
    "a continuation of nothing": (masked(CONTINUATION), PROTOCOL_ERROR),
    "a message within another": (masked(BINARY, b"x", final=False) + masked(BINARY, b"y"), PROTOCOL_ERROR),
    "one within an empty fragment": (masked(TEXT, final=False) + masked(TEXT, b"y"), PROTOCOL_ERROR),
    "a ping in fragments": (masked(PING, final=False), PROTOCOL_ERROR),
    "a long ping": (masked(PING, bytes(126)), PROTOCOL_ERROR),
    "a close of one byte": (masked(CLOSE, b"\3"), PROTOCOL_ERROR),
    "a code that is reserved": (masked(CLOSE, struct.pack(">H", 1005)), PROTOCOL_ERROR),
    "a code that is none": (masked(CLOSE, struct.pack(">H", 999)), PROTOCOL_ERROR),
    "a reason that is no text": (masked(CLOSE, struct.pack(">H", 1000) + b"\xff"), BAD_TEXT),
    "no text": (masked(TEXT, b"\xc3"), BAD_TEXT),
    "a surrogate": (masked(TEXT, b"\xed\xa0\x80"), BAD_TEXT),
    "too big": (masked(BINARY, bytes(MOST + 1)), TOO_BIG),
    "too big by its head": (b"\x82\xff" + struct.pack(">Q", 2**63), TOO_BIG),
    "too big in fragments": (masked(BINARY, bytes(MOST), final=False) + masked(CONTINUATION, b"x"), TOO_BIG),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("size", [1, 10**9])
def test_what_breaks_the_protocol_is_told_by_its_code_and_what_came_before_is_read(name: str, size: int) -> None:
    broken, code = BROKEN[name]
    sent, found = masked(BINARY, b"good") + broken, []
    frames = Frames(MOST)
    sent += bytes(4) * (name == "too big by its head")  # the mask is read before the length is looked at
    with pytest.raises(FrameError) as failed:  # noqa: PT012 pieces are fed until it fails
        for start in range(0, len(sent), size):
            frames.feed(sent[start : start + size])
            for message in frames.messages():
                found.append(message)  # noqa: PERF402 those before the failure, too
    assert failed.value.code == code
    assert found == [(BINARY, b"good")]


def test_a_ping_may_be_longer_than_what_is_left_for_a_message() -> None:
    sent = masked(BINARY, b"12345", final=False) + masked(PING, bytes(20)) + masked(CONTINUATION, b"6")
    assert read(Frames(6), [sent]) == [(PING, bytes(20)), (BINARY, b"123456")]


@pytest.mark.parametrize("code", [1000, 1001, 1011, 3000, 4999])
def test_a_goodbye_may_have_a_code_and_a_reason(code: int) -> None:
    payload = struct.pack(">H", code) + "für heute".encode()
    assert read(Frames(MOST), [masked(CLOSE, payload)]) == [(CLOSE, payload)]
    assert read(Frames(MOST), [masked(CLOSE)]) == [(CLOSE, b"")]


def test_a_long_reason_is_cut() -> None:
    assert close_frame(1001, "x" * 200) == bytes((0x88, 125)) + struct.pack(">H", 1001) + b"x" * 123


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_are_read_or_refused_alike_in_one_piece_and_in_many(data: bytes, size: int) -> None:
    def outcome(pieces: list[bytes]) -> tuple[list[tuple[int, bytes]], int | None]:
        frames, found = Frames(MOST), []
        try:
            for piece in pieces:
                frames.feed(piece)
                for kind, payload in frames.messages():
                    found.append((kind, bytes(payload)))
        except FrameError as error:
            return found, error.code
        return found, None

    assert outcome([data]) == outcome([data[start : start + size] for start in range(0, len(data), size)])
