"""When a reader gets frames: at once, in batches after a delay, or coalesced."""

import asyncio

from gateway.streaming.frames import DeltaFrame, Frame
from gateway.streaming.output_log import MAX_FRAMES_PER_BATCH, RequestOutput
from kvrelay.core.job import FinishReason, Token
from kvrelay.core.timeline import Phases

LONG_S = 30.0
"""Longer than any test takes."""


def append(output: RequestOutput, first_index: int, num_tokens: int) -> None:
    for index in range(first_index, first_index + num_tokens):
        output.append_delta(0, index, Token(index), "x", None)


def finish(output: RequestOutput) -> None:
    output.finish([FinishReason.LENGTH], 1, 0, Phases())


def indexes(batch: list[Frame]) -> list[int]:
    return [frame.index for frame in batch if isinstance(frame, DeltaFrame)]


async def test_a_reader_gets_tokens_at_once_and_in_one_batch_after_it_was_busy() -> None:
    output = RequestOutput()
    batches = output.read()
    append(output, 0, 1)
    assert indexes(await anext(batches)) == [0]
    append(output, 1, 3)
    assert indexes(await anext(batches)) == [1, 2, 3]
    finish(output)
    assert len(await anext(batches)) == 1
    assert [batch async for batch in batches] == []


async def test_coalescing_holds_back_neither_the_first_nor_the_last_token() -> None:
    output = RequestOutput()
    output.append_accepted("id", "model", 1, 1)
    batches = output.read(coalesce_s=LONG_S)
    assert indexes(await anext(batches)) == []
    append(output, 0, 1)
    assert indexes(await anext(batches)) == [0]
    gathering = asyncio.ensure_future(anext(batches))
    append(output, 1, 5)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not gathering.done()
    append(output, 6, 1)
    finish(output)
    async with asyncio.timeout(LONG_S / 2):
        assert indexes(await gathering) == [1, 2, 3, 4, 5, 6]


async def test_coalescing_ends_after_its_time() -> None:
    output = RequestOutput()
    append(output, 0, 1)
    batches = output.read(coalesce_s=0.01)
    assert indexes(await anext(batches)) == [0]
    append(output, 1, 3)
    async with asyncio.timeout(LONG_S):
        assert indexes(await anext(batches)) == [1, 2, 3]


async def test_a_reader_that_is_far_behind_catches_up_in_bounded_batches() -> None:
    output = RequestOutput()
    append(output, 0, 2 * MAX_FRAMES_PER_BATCH + 1)
    finish(output)
    assert [len(batch) async for batch in output.read()] == [MAX_FRAMES_PER_BATCH, MAX_FRAMES_PER_BATCH, 2]


async def test_readers_do_not_disturb_one_another() -> None:
    output = RequestOutput()
    left = asyncio.ensure_future(anext(output.read()))
    waiting = [asyncio.ensure_future(anext(output.read(from_index))) for from_index in (0, 1)]
    await asyncio.sleep(0)
    left.cancel()
    append(output, 0, 1)
    assert indexes(await waiting[0]) == [0]
    append(output, 1, 1)
    assert indexes(await waiting[1]) == [1]
