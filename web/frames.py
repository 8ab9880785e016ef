"""WebSocket frames (RFC 6455), as a server reads and writes them: no I/O, no extensions.

``Frames`` takes apart what a client sends, in pieces of any size. aiohttp has a reader, too, which hands over one
message at a time to one task that waits for it: that takes longer than all that a small query is to cost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from aiohttp._websocket.helpers import websocket_mask  # in C, in place; aiohttp has no public name for it

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
NORMAL, GOING_AWAY, PROTOCOL_ERROR, BAD_TEXT, TOO_BIG, INTERNAL_ERROR = 1000, 1001, 1002, 1007, 1009, 1011
_FINAL, _RESERVED, _OPCODE, _MASKED = 0x80, 0x70, 0x0F, 0x80
_WHOLE_BINARY = _FINAL | BINARY
_LONGEST_CONTROL = 125
_CODE = struct.Struct(">H")
# Codes that may be sent; those from 3000 on are for libraries and applications.
_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))


class FrameError(Exception):
    """What the client sends cannot be read on; ``code`` is the one to close the connection with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Frames:
    """What a client sends, taken apart; its messages may have so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most = self._left = most_bytes  # of a message, and of the one under way
        self._buffer = bytearray()
        self._position = 0  # what is before it was read
        self._enough = 2  # so long must the buffer be for anything to happen
        self._kind = 0  # of the message under way, of which there are fragments; 0: none is
        self._fragments = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what was received."""
        self._buffer += data

    def messages(self) -> Iterator[tuple[int, bytearray]]:
        """All that is complete: whole messages and control frames, by opcode. Raises FrameError.

        Who stops in between, and asks anew later, goes on after the last that was given.
        """
        buffer = self._buffer
        while len(buffer) >= self._enough:
            position = self._position
            first, length = buffer[position], buffer[position + 1] - _MASKED
            start = position + 6
            if first != _WHOLE_BINARY or length < 0 or self._kind:
                self._check(first, length)
            if length > _LONGEST_CONTROL:
                start = position + (8 if length == 126 else 14)
                if len(buffer) < start:
                    self._enough = start
                    break
                length = int.from_bytes(buffer[position + 2 : start - 4], "big")
            if length > self._left and not first & CLOSE:  # which control frames have in their opcode
                raise FrameError(TOO_BIG, f"a message of more than {self._most} bytes")
            end = start + length
            if len(buffer) < end:
                self._enough = end
                break
            payload = buffer[start:end]
            websocket_mask(bytes(buffer[start - 4 : start]), payload)
            self._position, self._enough = end, end + 2
            if first == _WHOLE_BINARY:
                yield BINARY, payload
            elif (found := self._assembled(first, payload)) is not None:
                yield found
        del buffer[: self._position]
        self._enough -= self._position
        self._position = 0

    def _check(self, first: int, length: int) -> None:
        """Whether a frame may begin like this; most do in the form that is not looked at."""
        opcode = first & _OPCODE
        if first & _RESERVED:
            raise FrameError(PROTOCOL_ERROR, "reserved bits are set")
        if length < 0:
            raise FrameError(PROTOCOL_ERROR, "a frame that is not masked")
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise FrameError(PROTOCOL_ERROR, f"a frame of unknown opcode {opcode}")
        if opcode >= CLOSE and (length > _LONGEST_CONTROL or not first & _FINAL):
            raise FrameError(PROTOCOL_ERROR, "a control frame that is long or fragmented")
        if opcode == CONTINUATION and not self._kind:
            raise FrameError(PROTOCOL_ERROR, "a continuation of nothing")
        if opcode in (TEXT, BINARY) and self._kind:
            raise FrameError(PROTOCOL_ERROR, "a message within another")

    def _assembled(self, first: int, payload: bytearray) -> tuple[int, bytearray] | None:
        """What this frame completes."""
        opcode = first & _OPCODE
        if opcode >= CLOSE:
            if opcode == CLOSE:
                _check_close(payload)
            return opcode, payload
        self._kind = opcode or self._kind
        self._fragments += payload
        self._left -= len(payload)
        if not first & _FINAL:
            return None
        found = self._kind, self._fragments
        self._kind, self._fragments, self._left = 0, bytearray(), self._most
        if found[0] == TEXT:
            _check_text(found[1])
        return found


def _check_text(payload: bytearray) -> None:
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise FrameError(BAD_TEXT, "a text that is not UTF-8") from None


def _check_close(payload: bytearray) -> None:
    if payload:
        code = int.from_bytes(payload[:2], "big")
        if len(payload) < 2 or not (code in _CODES or 3000 <= code < 5000):
            raise FrameError(PROTOCOL_ERROR, "a close frame without a code that may be sent")
        _check_text(payload[2:])


def frame(opcode: int, payload: bytes | bytearray) -> bytes:
    """A whole frame of a server, which does not mask."""
    length = len(payload)
    if length < 126:
        return bytes((_FINAL | opcode, length)) + payload
    if length < 2**16:
        return _MEDIUM(_FINAL | opcode, 126, length) + payload
    return _LONG(_FINAL | opcode, 127, length) + payload


_MEDIUM, _LONG = struct.Struct(">BBH").pack, struct.Struct(">BBQ").pack


def close_frame(code: int, reason: str = "") -> bytes:
    """The frame that says goodbye; a reason that is long is cut."""
    return frame(CLOSE, _CODE.pack(code) + reason.encode()[: _LONGEST_CONTROL - _CODE.size])
