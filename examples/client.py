"""A client of SuperServe that needs only aiohttp: one query by HTTP, or many at a time over one WebSocket.

    async with Client("http://127.0.0.1:8000") as client:
        reply = await client.predict(Path("examples/cat.jpg").read_bytes(), slo_ms=50)
        print(reply.predictions[0].label, reply.subnet, reply.deadline_met)

        async with client.stream() as stream:
            replies = await asyncio.gather(*(stream.predict(image, slo_ms=50) for image in images))

Both ``predict`` return a Reply, or raise ServerError with the server's status, reason and message. As a command:

    python examples/client.py examples/cat.jpg --slo-ms 50 --count 100
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

ANY_TYPE = "application/octet-stream"  # lets the server look at the bytes
_IN_EVERY_ERROR = ("id", "error", "reason", "status")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class with its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered to one query."""

    predictions: tuple[Prediction, ...]
    subnet: str
    accuracy: float
    batch_size: int
    slo_ms: float
    latency_ms: float
    queue_ms: float
    deadline_met: bool
    members: tuple[str, ...] = ()  # of an ensemble
    degraded: bool = False  # without members that failed


class ServerError(Exception):
    """The server refused a query or failed at it; ``details`` is all else that it said."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        super().__init__(document.get("error", ""))
        self.status = status
        self.reason = str(document.get("reason", ""))
        self.details = {name: value for name, value in document.items() if name not in _IN_EVERY_ERROR}


class ConnectionClosed(Exception):
    """The server closed the stream, with the WebSocket's close code, before it answered."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the stream was closed (code {code}) before the answer came")
        self.code = code


class Client:
    """Queries one server; to be entered with ``async with``."""

    def __init__(self, url: str = "http://127.0.0.1:8000") -> None:
        self._url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.close()

    @property
    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("enter the client first: async with Client(...) as client")
        return self._session

    async def predict(
        self,
        image: bytes,
        *,
        slo_ms: float | None = None,
        min_accuracy: float | None = None,
        priority: int | None = None,
        top_k: int | None = None,
        members: str | None = None,
        content_type: str = ANY_TYPE,
    ) -> Reply:
        """Ask about one encoded image, raw tensor or JSON document with POST /predict."""
        given = {
            "slo_ms": slo_ms, "min_accuracy": min_accuracy, "priority": priority, "top_k": top_k, "members": members,
        }  # fmt: skip
        parameters = {name: str(value) for name, value in given.items() if value is not None}
        headers = {"Content-Type": content_type}
        async with self._opened.post(
            f"{self._url}/predict", data=image, params=parameters, headers=headers
        ) as response:
            document = await response.json()
            if response.status != 200:
                raise ServerError(response.status, document)
            return _reply(document)

    @asynccontextmanager
    async def stream(self, in_flight: int = 256) -> AsyncIterator[Stream]:
        """A connection for many queries at a time, of which ``in_flight`` are under way at most; others wait here.

        The server has a limit of its own (``--max-in-flight``), and refuses what is beyond it.
        """
        async with self._opened.ws_connect(f"{self._url}/stream", max_msg_size=0) as socket:
            stream = Stream(socket, in_flight)
            receiver = asyncio.create_task(stream.receive())
            try:
                yield stream
            finally:
                await socket.close()
                await receiver


class Stream:
    """Many queries over one WebSocket; replies come as they are done, and find their query by its id."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, in_flight: int) -> None:
        self._socket = socket
        self._ids = itertools.count()
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._may_send = asyncio.Semaphore(in_flight)

    async def predict(
        self,
        image: bytes,
        *,
        slo_ms: float | None = None,
        min_accuracy: float | None = None,
        priority: int | None = None,
        top_k: int | None = None,
        members: str | None = None,
        content_type: str | None = None,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Reply:
        """Ask about one encoded image, or about one raw tensor of a dtype and a shape.

        Giving up waiting does not recall the query: only closing the stream does.
        """
        header = {
            "slo_ms": slo_ms, "min_accuracy": min_accuracy, "priority": priority, "top_k": top_k,
            "members": members, "content_type": content_type, "dtype": dtype, "shape": shape,
        }  # fmt: skip
        async with self._may_send:
            document = await self._ask({name: value for name, value in header.items() if value is not None}, image)
        if "error" in document:
            raise ServerError(document["status"], document)
        return _reply(document)

    async def _ask(self, header: dict[str, Any], payload: bytes) -> dict[str, Any]:
        message_id = next(self._ids)
        encoded = json.dumps({"id": message_id, **header}).encode()
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._replies[message_id] = reply
        try:
            if self._socket.closed:
                raise ConnectionClosed(self._socket.close_code)
            await self._socket.send_bytes(struct.pack("<I", len(encoded)) + encoded + payload)
            return await reply
        finally:
            del self._replies[message_id]

    async def receive(self) -> None:
        """Give each reply to who waits for it, until the connection is closed; ``Client.stream`` runs this."""
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                document = json.loads(message.data)
                waiting = self._replies.get(document["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(document)
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(ConnectionClosed(self._socket.close_code))


def _reply(document: Mapping[str, Any]) -> Reply:
    predictions = tuple(
        Prediction(each["label"], each["index"], each["probability"]) for each in document["predictions"]
    )
    return Reply(
        predictions=predictions,
        subnet=document["subnet"],
        accuracy=document["accuracy"],
        batch_size=document["batch_size"],
        slo_ms=document["slo_ms"],
        latency_ms=document["latency_ms"],
        queue_ms=document["queue_ms"],
        deadline_met=document["deadline_met"],
        members=tuple(document.get("members", ())),
        degraded=document.get("degraded", False),
    )


async def ask_often(url: str, image: bytes, slo_ms: float, count: int) -> Counter[str]:
    """Send one image many times over one stream; how often each subnet, or refusal, came back."""
    outcomes: Counter[str] = Counter()
    async with Client(url) as client, client.stream() as stream:
        queries = (stream.predict(image, slo_ms=slo_ms) for _ in range(count))
        for outcome in await asyncio.gather(*queries, return_exceptions=True):
            if isinstance(outcome, Reply):
                outcomes[f"{outcome.predictions[0].label} from {outcome.subnet}"] += 1
            elif isinstance(outcome, ServerError):
                outcomes[f"{outcome.status} {outcome.reason}"] += 1
            else:
                raise outcome
    return outcomes


def main() -> None:
    """Classify one image over a stream, once or often, and count the answers."""
    parser = argparse.ArgumentParser(description="Ask a running SuperServe about one image.")
    parser.add_argument("image", type=Path, help="a JPEG, PNG, WebP, GIF or BMP file")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the running server (default: %(default)s)")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="SLO in milliseconds (default: %(default)g)")
    parser.add_argument("--count", type=int, default=1, help="how often to ask, all at once (default: %(default)d)")
    options = parser.parse_args()
    try:
        for outcome, times in asyncio.run(
            ask_often(options.url, options.image.read_bytes(), options.slo_ms, options.count)
        ).most_common():
            print(f"{times} x {outcome}")
    except (aiohttp.ClientError, ConnectionClosed, OSError) as error:
        sys.exit(f"client: {error}")


if __name__ == "__main__":
    main()
