"""Real Valkey and Redis servers for tests, and a proxy that holds answers back."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from kvrelay.core.request_state import RequestState
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.request_record import RequestRecord
from kvrelay.state.state_store import StateStore
from tests.support import left_out

BOUND_S = 30.0
"""Bounds all waits, so that no test hangs."""


@pytest.fixture(params=["valkey", "redis"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[EmbeddedValkey]:
    """A server of this test alone."""
    redis_server = shutil.which("redis-server")
    if request.param == "redis" and redis_server is None:
        pytest.skip(left_out.REDIS_SERVER)
    # More than production's 10 s: see below.
    async with EmbeddedValkey(
        start_timeout_ms=60_000,
        binary=Path(redis_server or "") if request.param == "redis" else None,
        on_tcp=True,
    ) as started:
        yield started


@pytest.fixture
async def connection(server: EmbeddedValkey) -> AsyncIterator[RedisConnection]:
    # More than production's 200 ms, because a busy test machine is no fault.
    async with RedisConnection(server.url, timeout_ms=20_000) as opened:
        yield opened


@pytest.fixture
def store(connection: RedisConnection) -> StateStore:
    """The store of gateway g1."""
    return StateStore(connection, "g1")


def make_record(request_id: str = "r1", **changes: object) -> RequestRecord:
    """A queued request of gateway g1, one minute before its deadline."""
    values: dict[str, object] = {
        "request_id": request_id,
        "state": RequestState.QUEUED,
        "attempt": 1,
        "tenant": "tenant",
        "model": "model",
        "gateway_id": "g1",
        "num_prompt_tokens": 3,
        "create_time_ms": 1_700_000_000_000,
        "update_time_ms": 1_700_000_000_000,
        "deadline_time_ms": 1_700_000_060_000,
        "remaining_ms": 60_000,
        "prompt_token_ids": (5, 2**31, 7),
        "sampling": SamplingParams(seed=2**64 - 1, max_tokens=8),
    }
    return RequestRecord(**(values | changes))  # type: ignore[arg-type]


def state_in_proc(pid: int) -> str | None:
    """The process's state letter (T stopped, Z dead); None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return None


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = BOUND_S) -> None:
    """Polls until the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def admin_of(server: EmbeddedValkey) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis.from_url(server.url, protocol=2) as client:
        yield client


@contextlib.contextmanager
def stopped(server: EmbeddedValkey) -> Iterator[None]:
    """Makes the server hang for the block: it accepts connections and answers nothing."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        while state_in_proc(server.pid) != "T":
            os.sched_yield()
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


class HoldingProxy:
    """A TCP proxy that can pass the first bytes of an answer and hold the rest."""

    def __init__(self, target: EmbeddedValkey) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._pass_bytes: int | None = None
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.holds = asyncio.Event()
        """Set while an answer is held."""
        self.num_answered_bytes = 0
        self.num_connections = 0

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://:{self._target.password}@127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def hold_after(self, num_bytes: int) -> None:
        """Holds what follows the next `num_bytes` bytes of answers."""
        self._pass_bytes = num_bytes
        self._released.clear()
        self.holds.clear()

    def release(self) -> None:
        """Lets everything pass again."""
        self._pass_bytes = None
        self._released.set()

    async def __aenter__(self) -> "HoldingProxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        # Lets connections accepted at the last moment be served, so that they are closed too.
        for _ in range(3):
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_connections += 1
        try:
            await self._forward(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            await _close(writer)
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target.port)
        answers = asyncio.create_task(self._forward_answers(server_reader, writer))
        try:
            while data := await reader.read(65536):
                server_writer.write(data)
        finally:
            answers.cancel()
            await asyncio.wait([answers])
            await _close(server_writer)

    async def _forward_answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self._pass_bytes is not None:
                    passed, data = data[: self._pass_bytes], data[self._pass_bytes :]
                    self._write(writer, passed)
                    self._pass_bytes -= len(passed)
                    if data:
                        self.holds.set()
                        await self._released.wait()
                self._write(writer, data)

    def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.num_answered_bytes += len(data)
        writer.write(data)


Answerer = Callable[[list[bytes]], bytes]
"""Maps a command to the answer as Redis writes it."""


class FakeRedis:
    """Answers in Redis's protocol as real servers do in states that are hard to bring about.

    `answer` is asked first; where it returns b"", `answer_well` answers.
    """

    def __init__(self, answer: Answerer) -> None:
        self.answer = answer
        self.num_commands = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def __aenter__(self) -> "FakeRedis":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                words = []
                for _ in range(int(line[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2])
                self.num_commands += 1
                writer.write(self.answer(words) or answer_well(words))
        self._writers.discard(writer)
        writer.close()


def answer_well(words: list[bytes]) -> bytes:
    """Answers of a healthy server, as far as a connection needs them."""
    if words[0] in (b"EVAL", b"EVALSHA"):
        return b":1\r\n"
    return bulk(b"redis_version:7.2.0\r\nredis_mode:standalone\r\n") if words[0] == b"INFO" else b"+OK\r\n"


def bulk(text: bytes) -> bytes:
    """A text as Redis sends it."""
    return b"$%d\r\n%s\r\n" % (len(text), text)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
