"""A worker that sends a far too large tokenizer, or none, costs a gateway little."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from gateway.workers import tokenizer_cache
from gateway.workers.tokenizer_cache import fetch_files
from kvrelay.errors import PreconditionError, UnavailableError
from kvrelay.network.rpc import create_channel, create_server
from kvrelay.v1 import session_pb2, session_pb2_grpc


class Worker(session_pb2_grpc.ModelServiceServicer):
    def __init__(self, *pieces: session_pb2.GetTokenizerResponse, waits: bool = False) -> None:
        self._pieces = pieces
        self._waits = waits
        self.has_ended = asyncio.Event()

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[session_pb2.GetTokenizerResponse]:
        try:
            for piece in self._pieces:
                yield piece
            if self._waits:
                await asyncio.Event().wait()
        finally:
            self.has_ended.set()


@asynccontextmanager
async def channel_to(worker: Worker) -> AsyncIterator[grpc.aio.Channel]:
    server = create_server()
    session_pb2_grpc.add_ModelServiceServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with create_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


def piece(name: str, num_bytes: int) -> session_pb2.GetTokenizerResponse:
    return session_pb2.GetTokenizerResponse(file_name=name, content=bytes(num_bytes))


@pytest.mark.parametrize("name", ["tokenizer.json", "unknown.bin"])
async def test_files_beyond_the_bound_are_broken_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_cache, "MAX_TOTAL_BYTES", 1 << 20)
    worker = Worker(*[piece(name, 100_000)] * 100)
    async with channel_to(worker) as channel, asyncio.timeout(60):
        with pytest.raises(PreconditionError, match="larger than 1 MiB"):
            await fetch_files(channel, "f")
        await worker.has_ended.wait()


async def test_files_that_do_not_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_cache, "FETCH_TIMEOUT_S", 0.1)
    async with channel_to(Worker(piece("tokenizer.json", 1), waits=True)) as channel, asyncio.timeout(60):
        with pytest.raises(UnavailableError):
            await fetch_files(channel, "f")


@pytest.mark.parametrize("max_bytes", [1 << 20, 1])
async def test_a_read_leaves_no_call_for_the_collector(max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would hold the connection of a worker that is gone."""
    monkeypatch.setattr(tokenizer_cache, "MAX_TOTAL_BYTES", max_bytes)
    async with channel_to(Worker(piece("tokenizer.json", 5))) as channel:
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(PreconditionError):
                await fetch_files(channel, "f")
            assert [each for each in gc.get_objects() if isinstance(each, grpc.aio.UnaryStreamCall)] == []
        finally:
            gc.enable()


async def test_files_of_unknown_names_are_not_kept() -> None:
    worker = Worker(piece("tokenizer.json", 5), piece("../../etc/passwd", 5), piece("tokenizer.json", 6))
    async with channel_to(worker) as channel:
        assert await fetch_files(channel, "f") == {"tokenizer.json": bytes(11)}
