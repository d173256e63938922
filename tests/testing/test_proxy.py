"""The proxy in front of a process: what one connection waits for is no fault of the others."""

import asyncio
import threading

import pytest

from kvrelay.testing.proxy import FaultProxy
from kvrelay.testing.waiting import wait_until


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1024):
        writer.write(data)
    writer.close()


@pytest.mark.timeout(90)
async def test_traffic_goes_on_while_it_is_looked_up_who_connects() -> None:
    looked_up: list[int] = []
    may_end = threading.Event()

    async def find_source(port: int) -> str:
        looked_up.append(port)
        if len(looked_up) == 1:
            return "first"
        assert await asyncio.to_thread(may_end.wait, 60)
        return "second"

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1], find_source) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        second_reader, second_writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            await wait_until(lambda: len(looked_up) == 2, "the second is looked up")
            writer.write(b"two")
            async with asyncio.timeout(30):
                assert await reader.readexactly(3) == b"two"
        finally:
            may_end.set()
        second_writer.write(b"three")
        assert await second_reader.readexactly(5) == b"three"
        assert {link.source for link in proxy.links()} == {"first", "second"}
        for each in (writer, second_writer):
            each.close()
            await each.wait_closed()
