"""What the server does on threads of its own, beside the event loop, and that nothing waits for them without limit."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import PATIENT_MS, config_of, fake_engine, image_file, turns_until

from superserve import ASIDE, SuperServe
from web.errors import BadRequest, NotReady

LARGE_PNG = image_file("PNG", (600, 500))


@pytest.fixture
async def occupied() -> AsyncIterator[None]:
    """The event loop's own executor does something that takes for ever."""
    loop, release = asyncio.get_running_loop(), threading.Event()
    executor = ThreadPoolExecutor(1)
    loop.set_default_executor(executor)
    occupying = loop.run_in_executor(None, release.wait)
    yield
    release.set()
    await occupying


@pytest.mark.usefixtures("occupied")
async def test_a_server_decodes_and_closes_though_all_other_threads_are_taken(profile: Path) -> None:
    async with asyncio.timeout(30):
        serve = SuperServe(config_of(profile))
        fake_engine(serve)
        async with serve:
            reply = await serve.infer(LARGE_PNG, slo_ms=PATIENT_MS)
            assert reply.deadline_met
        with pytest.raises(NotReady, match="draining"):
            await serve.decode(LARGE_PNG, "image/png")


async def test_closing_leaves_alone_what_takes_for_ever(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("superserve.LAST_WORDS_S", 0.05)
    release = threading.Event()
    async with asyncio.timeout(30):
        serve = SuperServe(config_of(profile))
        engine = fake_engine(serve)
        await serve.start()
        stuck = [asyncio.create_task(serve.aside(release.wait)) for _ in range(ASIDE + 1)]
        await turns_until(lambda: sum(thread.name == "aside" for thread in threading.enumerate()) >= ASIDE)
        await serve.close()
        assert engine.closed
        answers = await asyncio.gather(*stuck, return_exceptions=True)
        assert [str(answer) for answer in answers if isinstance(answer, NotReady)] == ["draining"] * (ASIDE + 1)
    release.set()


async def test_what_is_under_way_when_the_server_closes_is_finished(profile: Path) -> None:
    release = threading.Event()
    serve = SuperServe(config_of(profile))
    fake_engine(serve)
    await serve.start()
    encoding = asyncio.create_task(serve.aside(release.wait))
    await asyncio.sleep(0)
    closing = asyncio.create_task(serve.close())
    await asyncio.sleep(0)
    release.set()
    await closing
    assert await encoding is True
    assert await serve.aside(lambda: 5) == 5, "the last answers are encoded in any case"


async def test_errors_come_back_as_they_are(profile: Path) -> None:
    async with SuperServe(config_of(profile)) as serve:
        with pytest.raises(BadRequest, match="cannot be decoded"):
            await serve.infer(LARGE_PNG[:60] + bytes(40_000))
        with pytest.raises(ZeroDivisionError):
            await serve.aside(lambda: 1 // 0)


async def test_what_nobody_waits_for_any_more_is_not_begun(profile: Path) -> None:
    release, begun = threading.Event(), threading.Event()
    async with SuperServe(config_of(profile)) as serve:
        busy = [asyncio.create_task(serve.aside(release.wait)) for _ in range(ASIDE)]
        await asyncio.sleep(0)
        left = asyncio.create_task(serve.aside(begun.set))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        release.set()
        await asyncio.gather(*busy)
        await serve.aside(lambda: None)
        assert not begun.is_set()
