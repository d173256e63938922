"""A few work at once, the others wait in a bounded line."""

import asyncio

import pytest

from gateway.requests.turns import Turns
from kvrelay.errors import OverloadedError


async def test_no_more_than_allowed_work_at_once_and_all_get_their_turn() -> None:
    turns, working, most, done = Turns("x", at_once=2, max_waiting=100), 0, 0, 0

    async def work() -> None:
        nonlocal working, most, done
        async with turns.turn():
            working += 1
            most = max(most, working)
            for _ in range(3):
                await asyncio.sleep(0)
            working -= 1
            done += 1

    await asyncio.gather(*(work() for _ in range(50)))
    assert (most, done) == (2, 50)


async def test_who_finds_the_line_full_is_refused_at_once() -> None:
    turns, may_end = Turns("a list", at_once=1, max_waiting=1), asyncio.Event()

    async def hold() -> None:
        async with turns.turn():
            await may_end.wait()

    holding = [asyncio.create_task(hold()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="wait for a list") as refused:
        async with turns.turn():
            pass
    assert refused.value.retry_after_ms
    may_end.set()
    await asyncio.gather(*holding)
    async with turns.turn():
        pass


async def test_a_wait_ends() -> None:
    turns = Turns("x", at_once=1, max_waiting=1, max_wait_s=0)
    async with turns.turn():
        with pytest.raises(OverloadedError):
            async with turns.turn():
                pass
    async with turns.turn():  # a wait that ended took no turn
        pass


async def test_a_cancelled_wait_and_a_failure_give_back_what_they_took() -> None:
    turns = Turns("x", at_once=1, max_waiting=1)

    async def wait() -> None:
        async with turns.turn():
            raise AssertionError("it had no turn")

    async with turns.turn():
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    with pytest.raises(ValueError, match="work"):
        async with turns.turn():
            raise ValueError("work")
    async with turns.turn():
        pass
