"""Options of gRPC do what their names say, with the version that is installed."""

import asyncio
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kvrelay.config.connection_settings import LEAST_STREAMS, ConnectionSettings
from kvrelay.config.settings import GatewaySettings, RequestSettings
from kvrelay.network.connection_limits import ConnectionLimits
from kvrelay.network.rpc import create_channel, create_server
from tests.support import raw_http2
from tests.support.raw_http2 import PREFACE, SETTINGS, frame

HOST = "127.0.0.1"
MAX_CONCURRENT_STREAMS = 3
"""Number of the setting."""


@asynccontextmanager
async def serving(limits: ConnectionLimits, behaviour: Any = None) -> AsyncIterator[int]:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = create_server(limits=limits)
    handler: Any = grpc.unary_unary_rpc_method_handler(behaviour or echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.Y", {"Z": handler}),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def settings_of(port: int) -> dict[int, int]:
    """Numbers and values of the server's first SETTINGS frame."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0))
    head = await reader.readexactly(9)
    assert head[3] == SETTINGS
    payload = await reader.readexactly(int.from_bytes(head[:3]))
    writer.close()
    return dict(struct.iter_unpack(">HI", payload))


async def test_a_server_tells_how_many_calls_a_connection_may_have() -> None:
    async with serving(ConnectionLimits(max_streams=7)) as port:
        assert (await settings_of(port))[MAX_CONCURRENT_STREAMS] == 7


async def test_more_calls_than_a_connection_may_have_wait_at_the_client() -> None:
    running: list[bytes] = []
    five_run, may_end = asyncio.Event(), asyncio.Event()

    async def held(request: bytes, context: Any) -> bytes:
        if request == b"another connection":
            return request
        running.append(request)
        if len(running) == 5:
            five_run.set()
        await may_end.wait()
        return request

    async with (
        serving(ConnectionLimits(max_streams=5), held) as port,
        create_channel(f"{HOST}:{port}") as channel,
        create_channel(f"{HOST}:{port}") as other,
    ):
        call: Any = channel.unary_unary("/x.Y/Z")
        calls = [call(b"%d" % number, timeout=60) for number in range(60)]
        async with asyncio.timeout(60):
            await five_run.wait()
            # the server has read what came before: it answers a later call of another connection
            beside: Any = other.unary_unary("/x.Y/Z")
            assert await beside(b"another connection", timeout=60) == b"another connection"
        assert len(running) == 5
        may_end.set()
        assert await asyncio.gather(*calls) == [b"%d" % number for number in range(60)]


async def test_a_message_above_the_bound_is_refused_and_an_answer_is_not() -> None:
    async def grow(request: bytes, context: Any) -> bytes:
        return request * 4

    limits = ConnectionLimits(max_message_bytes=64 * 1024)
    async with serving(limits, grow) as port, create_channel(f"{HOST}:{port}") as channel:
        call: Any = channel.unary_unary("/x.Y/Z")
        assert len(await call(bytes(60 * 1024), timeout=60)) == 240 * 1024
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call(bytes(70 * 1024), timeout=60)
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("greeting", "limits"),
    [
        (b"", ConnectionLimits(idle_timeout_ms=3_600_000, handshake_timeout_ms=500)),
        (PREFACE + frame(SETTINGS, 0, 0), ConnectionLimits(idle_timeout_ms=1000, handshake_timeout_ms=3_600_000)),
    ],
    ids=["silent", "without calls"],
)
async def test_a_connection_that_asks_nothing_is_closed(greeting: bytes, limits: ConnectionLimits) -> None:
    async with serving(limits) as port:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(greeting)
        async with asyncio.timeout(60):  # bounds a hang only
            while await reader.read(4096):
                pass
        writer.close()


async def test_connections_above_the_bound_are_closed_and_room_is_given_back() -> None:
    async with serving(ConnectionLimits(max_connections=3)) as port:
        kept = [await asyncio.open_connection(HOST, port) for _ in range(3)]
        for reader, _ in kept:
            assert len(await asyncio.wait_for(reader.readexactly(9), 60)) == 9
        reader, writer = await asyncio.open_connection(HOST, port)
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()
        for _, writer in kept:
            writer.close()
        async with asyncio.timeout(60), create_channel(f"{HOST}:{port}") as channel:
            call: Any = channel.unary_unary("/x.Y/Z")
            while True:
                try:
                    assert await call(b"again") == b"again"
                    break
                except grpc.aio.AioRpcError:  # until the server has seen the ends
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "num_resets", [40_000, pytest.param(2_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
async def test_a_connection_that_resets_its_calls_at_once_cancels_none_of_others(num_resets: int) -> None:
    results: Counter[str] = Counter()
    over = asyncio.Event()
    async with serving(ConnectionSettings().limits(256)) as port:

        async def ask() -> None:
            async with create_channel(f"{HOST}:{port}") as channel:
                call: Any = channel.unary_unary("/x.Y/Z")
                while not over.is_set():
                    try:
                        await call(b"x", timeout=120)
                        results["OK"] += 1
                    except grpc.aio.AioRpcError as failure:
                        results[failure.code().name] += 1

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        attack = await asyncio.create_subprocess_exec(
            sys.executable, "-m", raw_http2.__name__, str(port), "/x.Y/Z", str(num_resets), stdout=subprocess.PIPE
        )
        output, _ = await attack.communicate()
        over.set()
        await asyncio.gather(*asking)
    assert int(output) > num_resets // 10, "the attack took place"
    assert set(results) == {"OK"}


def test_calls_that_wait_for_a_handler_are_cancelled_only_far_above_what_a_few_connections_may_have() -> None:
    """By default gRPC does so above 1000, of all connections."""
    options = dict(ConnectionSettings().limits(256).options)
    assert options["grpc.server.max_pending_requests"] >= 50 * LEAST_STREAMS
    assert options["grpc.server.max_pending_requests_hard_limit"] > options["grpc.server.max_pending_requests"]


def test_one_connection_can_use_all_places_of_a_gateway() -> None:
    def streams(**requests: int) -> int:
        return GatewaySettings(requests=RequestSettings(**requests)).connection_limits.max_streams

    assert streams() == LEAST_STREAMS > RequestSettings().max_running_requests
    assert streams(max_running_requests=1000) == 1000
    limits = ConnectionSettings(max_message_kib=8192, max_streams_per_connection=5).limits(256)
    assert (limits.max_message_bytes, limits.max_streams) == (8 * 2**20, 5)
