"""The load generator's own reader gets from a real gRPC server what a client library would get."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from benchmarks.http2_streams import BrokenConnectionError, read_streams

METHOD = "/test.Numbers/Count"


@asynccontextmanager
async def serving(behaviour: Any) -> AsyncIterator[str]:
    server = grpc.aio.server()
    handler: Any = grpc.unary_stream_rpc_method_handler(behaviour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Numbers", {"Count": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_every_message_of_every_stream_arrives_in_order_whatever_the_frames() -> None:
    sizes = [1, 0, 100, 40_000, 300_000, 7]

    async def count(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number, size in enumerate(sizes):
            yield request + bytes([number]) * size

    async with serving(count) as address:
        streams = await asyncio.to_thread(read_streams, address, METHOD, [b"a", b"bc", b""], 20.0)
    expected = [
        [request + bytes([number]) * size for number, size in enumerate(sizes)] for request in (b"a", b"bc", b"")
    ]
    assert [[message for _, message in stream] for stream in streams] == expected
    for stream in streams:
        times = [time_s for time_s, _ in stream]
        assert times == sorted(times)


async def test_a_server_that_goes_away_is_an_error() -> None:
    begun = asyncio.Event()

    async def count(request: bytes, context: Any) -> AsyncIterator[bytes]:
        begun.set()
        await asyncio.sleep(60)
        yield b""

    async with serving(count) as address:
        reading = asyncio.create_task(asyncio.to_thread(read_streams, address, METHOD, [b""], 20.0))
        await begun.wait()
    with pytest.raises((BrokenConnectionError, ConnectionError)):
        await reading
