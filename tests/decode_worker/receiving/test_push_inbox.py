"""A push is read a few messages ahead, whatever the sender does."""

import asyncio
import contextlib

import grpc
import pytest

from decode_worker.receiving.push_inbox import MAX_READ_AHEAD, PushInbox
from kvrelay.errors import CancelledRequestError, TransferError


class Stream:
    """Messages of a sender that does not wait."""

    def __init__(self, num_messages: int | None = None) -> None:
        self.num_read = 0
        self._num_messages = num_messages

    async def read(self) -> object:
        await asyncio.sleep(0)
        if self.num_read == self._num_messages:
            return grpc.aio.EOF
        self.num_read += 1
        return b"%d" % self.num_read


async def turns() -> None:
    for _ in range(20 * MAX_READ_AHEAD):
        await asyncio.sleep(0)


async def test_no_more_is_read_than_a_few_messages_ahead() -> None:
    stream = Stream()
    inbox = PushInbox(stream)
    reading = asyncio.create_task(inbox.read())
    await turns()
    assert stream.num_read == MAX_READ_AHEAD
    assert await inbox.take() == [b"%d" % (number + 1) for number in range(MAX_READ_AHEAD)]
    await turns()
    assert stream.num_read == 2 * MAX_READ_AHEAD
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading


async def test_an_end_without_an_end_message_is_an_error() -> None:
    inbox = PushInbox(Stream(1))
    reading = asyncio.create_task(inbox.read())
    assert await inbox.take() == [b"1"]
    with pytest.raises(TransferError):
        await inbox.take()
    await reading


async def test_nothing_is_taken_for_a_reservation_that_has_ended() -> None:
    inbox = PushInbox(Stream(1))
    await inbox.read()
    inbox.close()
    with pytest.raises(CancelledRequestError):
        await inbox.take()
