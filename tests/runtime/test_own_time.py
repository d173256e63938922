"""A limit in the process's own time."""

import asyncio
import time

import pytest

from kvrelay.runtime.own_time import own_time_limit

LIMIT_S = 0.1
STALL_S = 5 * LIMIT_S


async def test_a_loop_that_stood_still_reads_the_answer_that_came_meanwhile() -> None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def stand_still() -> None:
        time.sleep(STALL_S)  # what a busy machine or a long callback does
        loop.call_soon(answer.set_result, "late")

    loop.call_soon(stand_still)
    begin = time.monotonic()
    async with own_time_limit(LIMIT_S):
        assert await answer == "late"
    assert time.monotonic() - begin >= STALL_S, "the limit had passed by the clock"


async def test_an_answer_that_comes_with_the_end_of_the_limit_is_read() -> None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()
    num_stalls = 0

    def stand_still() -> None:
        nonlocal num_stalls
        num_stalls += 1
        time.sleep(LIMIT_S)
        if num_stalls < 8:
            loop.call_soon(stand_still)
        else:
            answer.set_result("at last")

    loop.call_soon(stand_still)
    async with own_time_limit(LIMIT_S):
        assert await answer == "at last"


async def test_nothing_is_waited_for_for_ever() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        async with own_time_limit(LIMIT_S):
            await asyncio.Event().wait()
    assert time.monotonic() - begin >= 0.9 * LIMIT_S


async def test_a_loop_that_stands_still_again_and_again_does_not_keep_the_limit_from_passing() -> None:
    loop = asyncio.get_running_loop()
    stalls = True

    def stand_still() -> None:
        time.sleep(LIMIT_S / 2)
        if stalls:
            loop.call_later(0.001, stand_still)

    loop.call_soon(stand_still)
    with pytest.raises(TimeoutError):
        async with own_time_limit(LIMIT_S):
            await asyncio.Event().wait()
    stalls = False


async def test_it_leaves_no_timer_and_lets_others_cancel() -> None:
    async def wait() -> None:
        async with own_time_limit(30):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    scheduled = getattr(asyncio.get_running_loop(), "_scheduled", [])
    assert all(timer.cancelled() for timer in scheduled if "own_time" in repr(timer))
