"""Streams take turns, in order, and none holds the others up."""

import asyncio
import itertools

from gateway.streaming.output_log import RequestOutput
from gateway.streaming.write_throttle import WriteThrottle
from kvrelay.core.job import Token


async def test_each_iteration_lets_a_limited_number_of_streams_pass_in_order() -> None:
    throttle = WriteThrottle(streams_per_iteration=2)
    passed: list[int] = []
    turns: list[int] = []

    async def stream(number: int) -> None:
        await throttle.acquire()
        passed.append(number)

    streams = [asyncio.create_task(stream(number)) for number in range(7)]
    while len(passed) < 7:
        await asyncio.sleep(0)
        turns.append(len(passed))
    assert passed == list(range(7))
    assert all(later - earlier <= 2 for earlier, later in itertools.pairwise(turns))
    await asyncio.gather(*streams)


async def test_a_cancelled_waiting_stream_uses_no_turn() -> None:
    throttle = WriteThrottle(streams_per_iteration=1)
    first, second, third = (asyncio.create_task(throttle.acquire()) for _ in range(3))
    await first
    second.cancel()
    async with asyncio.timeout(10):
        await third


async def test_tokens_that_come_while_a_stream_waits_for_its_turn_are_read_together() -> None:
    throttle = WriteThrottle(streams_per_iteration=1)
    outputs = [RequestOutput(), RequestOutput()]
    reading = [asyncio.ensure_future(anext(output.read(throttle=throttle))) for output in outputs]
    await asyncio.sleep(0)
    for output in outputs:
        output.append_delta(0, 0, Token(1), "a", None)
    await reading[0]
    outputs[1].append_delta(0, 1, Token(2), "b", None)
    assert [len(await task) for task in reading] == [1, 2]
