"""Streams take turns, in order, and none holds the others up."""

import asyncio
import itertools

from gateway.request_output import RequestOutput
from gateway.turnstile import Turnstile
from kvrelay.work import Token


async def test_so_many_streams_pass_in_a_turn_of_the_loop_and_all_in_order() -> None:
    turnstile = Turnstile(streams_per_turn=2)
    passed: list[int] = []
    turns: list[int] = []

    async def stream(number: int) -> None:
        await turnstile.pass_through()
        passed.append(number)

    streams = [asyncio.create_task(stream(number)) for number in range(7)]
    while len(passed) < 7:
        await asyncio.sleep(0)
        turns.append(len(passed))
    assert passed == list(range(7))
    assert all(later - earlier <= 2 for earlier, later in itertools.pairwise(turns))
    await asyncio.gather(*streams)


async def test_a_stream_that_is_cancelled_while_it_waits_takes_nobodys_turn() -> None:
    turnstile = Turnstile(streams_per_turn=1)
    first, second, third = (asyncio.create_task(turnstile.pass_through()) for _ in range(3))
    await first
    second.cancel()
    async with asyncio.timeout(10):
        await third


async def test_tokens_that_come_while_a_stream_waits_for_its_turn_are_read_together() -> None:
    turnstile = Turnstile(streams_per_turn=1)
    outputs = [RequestOutput(), RequestOutput()]
    reading = [asyncio.ensure_future(anext(output.read(turnstile=turnstile))) for output in outputs]
    await asyncio.sleep(0)
    for output in outputs:
        output.append_delta(0, 0, Token(1), "a", None)
    await reading[0]
    outputs[1].append_delta(0, 1, Token(2), "b", None)
    assert [len(await task) for task in reading] == [1, 2]
