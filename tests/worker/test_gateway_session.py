"""One session's bounds: its greeting, its window, its queue, and gateways that do not read."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc
import pytest

from kvrelay.core.job import CacheChanges, WorkerLoad
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.errors import DeadlineError, OverloadedError, UnavailableError
from kvrelay.security.cluster_key import Challenge, ClusterKey, WorkerProof
from kvrelay.security.principal import Role
from kvrelay.v1 import decode_pb2, session_pb2
from kvrelay.worker import gateway_session, gateway_sessions
from kvrelay.worker.gateway_session import MAX_WINDOW_MS, MIN_WINDOW_MS, GatewaySession
from kvrelay.worker.gateway_sessions import GatewaySessions


class Call:
    """A gateway that greets, if it has a greeting, and then neither speaks nor reads."""

    def __init__(self, greeting: Any = None) -> None:
        self._unread = [] if greeting is None else [greeting]
        self.written: list[Any] = []
        self.reads = True

    async def read(self) -> Any:
        if not self._unread:
            await asyncio.Event().wait()
        return self._unread.pop()

    async def write(self, response: Any) -> None:
        if not self.reads:
            await asyncio.Event().wait()
        self.written.append(response)


def greeting(window_ms: int) -> Any:
    hello = session_pb2.GatewayHello(gateway_id="g", protocol_version=PROTOCOL_VERSION, liveness_window_ms=window_ms)
    return decode_pb2.DecodeServiceSessionRequest(hello=hello)


def session_over(call: Any) -> GatewaySession:
    make: Any = decode_pb2.DecodeServiceSessionResponse
    return GatewaySession(call, session_pb2.WorkerHello(), make, lambda session, name, command: None)


async def test_a_worker_with_a_key_proves_itself_in_its_greeting() -> None:
    key = ClusterKey(b"k" * 32)
    key.listens(lambda dialled: dialled == "127.0.0.1:1")
    make: Any = decode_pb2.DecodeServiceSessionResponse
    challenge = Challenge(key, Role.DECODE, "127.0.0.1:1")
    greets = greeting(5000)
    greets.hello.nonce, greets.hello.dialled_address = challenge.nonce, challenge.address
    call: Any = Call(greets)
    hello = session_pb2.WorkerHello(worker_id="w")
    prove = partial(key.prove_worker, Role.DECODE)
    await GatewaySession(call, hello, make, lambda session, name, command: None, prove).handshake()
    answer = call.written[0].hello
    assert answer.worker_id == "w"
    assert challenge.is_met_by(WorkerProof(answer.nonce, answer.proof))
    assert hello == session_pb2.WorkerHello(worker_id="w")


async def test_who_does_not_greet_in_time_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_session, "HELLO_TIMEOUT_S", 0.01)
    async with asyncio.timeout(60):  # bounds a hang only
        with pytest.raises(DeadlineError, match="no greeting"):
            await session_over(Call()).handshake()


async def test_who_has_not_greeted_yet_takes_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_sessions, "MAX_SESSIONS", 2)
    model = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 10, 64, (0,), "f")
    sessions = GatewaySessions(
        session_pb2.WorkerHello(), decode_pb2.DecodeServiceSessionResponse, model, lambda _: None, lambda *_: None
    )

    def serve() -> asyncio.Task[None]:
        call: Any = Call()
        return asyncio.create_task(sessions.serve(call, lambda session, name, command: None))

    silent = [serve(), serve()]
    await asyncio.sleep(0)
    for _ in range(3):
        with pytest.raises(OverloadedError):
            await serve()
    silent[0].cancel()
    await asyncio.wait([silent[0]])
    silent.append(serve())
    await asyncio.sleep(0)
    assert not silent[-1].done()
    for task in silent:
        task.cancel()
    await asyncio.wait(silent)


def test_a_job_of_too_many_tokens_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_sessions, "job_from_pb", lambda _: pytest.fail("read"))
    model = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 10, 64, (0,), "f")
    sessions = GatewaySessions(
        session_pb2.WorkerHello(), decode_pb2.DecodeServiceSessionResponse, model, lambda _: None, lambda *_: None
    )
    sent: list[Any] = []

    class Sink:
        gateway_id = "g"

        def send(self, **message: Any) -> None:
            sent.append(message["job_failed"].kind)

    message = decode_pb2.Reserve(job_id=session_pb2.JobId(request_id="r", attempt=1), token_ids=[1] * 64)
    sessions.admit(Sink(), message, lambda job: pytest.fail("begun"))
    assert sent == [session_pb2.FAILURE_KIND_INVALID]


@pytest.mark.parametrize(
    ("asked_ms", "given_ms"), [(0, MIN_WINDOW_MS), (5000, 5000), (2**32 - 1, MAX_WINDOW_MS)], ids=str
)
async def test_the_window_lies_within_bounds_whatever_is_asked_for(asked_ms: int, given_ms: int) -> None:
    session = session_over(Call(greeting(asked_ms)))
    await session.handshake()
    now = asyncio.get_running_loop().time()
    session._liveness.received(now)
    assert session._window_s == given_ms / 1000
    assert not session._liveness.lost(now)


async def test_events_that_a_gateway_does_not_take_are_bounded_and_end_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway_session, "MAX_QUEUED_MESSAGES", 3)
    session = session_over(call := Call(greeting(MIN_WINDOW_MS)))
    await session.handshake()
    call.reads = False
    for number in range(100):
        session.send(heartbeat=session_pb2.Heartbeat(number=number))
    assert session._outbox.qsize() == 3
    assert session._overflown.is_set()
    async with asyncio.timeout(60):  # bounds a hang only
        with pytest.raises(UnavailableError):
            await session.serve(asyncio.Event())


async def test_a_gateway_that_answers_and_does_not_read_loses_its_session() -> None:
    call = Call(greeting(MIN_WINDOW_MS))
    session = session_over(call)
    await session.handshake()
    call.reads = False

    async def answer_for_ever() -> Any:
        await asyncio.sleep(0.005)
        return decode_pb2.DecodeServiceSessionRequest(heartbeat_ack=session_pb2.HeartbeatAck(number=1))

    call.read = answer_for_ever  # type: ignore[method-assign]
    async with asyncio.timeout(60):  # bounds a hang only
        with pytest.raises(UnavailableError, match="does not read"):
            await session.serve(asyncio.Event())


async def test_a_gateway_that_falls_silent_loses_its_session() -> None:
    session = session_over(Call(greeting(MIN_WINDOW_MS)))
    await session.handshake()
    async with asyncio.timeout(60):  # bounds a hang only
        with pytest.raises(UnavailableError, match="was silent"):
            await session.serve(asyncio.Event())


async def test_a_gateway_that_ends_its_call_is_not_lost() -> None:
    call = Call(greeting(MAX_WINDOW_MS))
    session = session_over(call)
    await session.handshake()
    call._unread.append(grpc.aio.EOF)
    async with asyncio.timeout(60):  # bounds a hang only
        await session.serve(asyncio.Event())


def caching_sessions() -> GatewaySessions:
    model = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 10, 64, (0,), "f")
    return GatewaySessions(
        session_pb2.WorkerHello(), decode_pb2.DecodeServiceSessionResponse, model, lambda _: None, lambda *_: None
    )


class ReadingCall(Call):
    """Sets an event with each message that it gets."""

    def __init__(self, greeting: Any) -> None:
        super().__init__(greeting)
        self.has_message = asyncio.Event()

    async def write(self, response: Any) -> None:
        await super().write(response)
        self.has_message.set()

    async def next_message(self) -> Any:
        async with asyncio.timeout(60):  # bounds a hang only
            await self.has_message.wait()
        self.has_message.clear()
        return self.written[-1]


@pytest.mark.parametrize("wants", [True, False])
async def test_who_asks_for_it_is_told_what_the_cache_holds(wants: bool) -> None:
    sessions = caching_sessions()
    sessions.update_cache(CacheChanges(published=(b"a" * 16, b"b" * 16)))
    call: Any = ReadingCall(greeting(MAX_WINDOW_MS))
    call._unread[0].hello.wants_cache_changes = wants
    serving = asyncio.create_task(sessions.serve(call, lambda session, name, command: None))
    hello = await call.next_message()
    assert hello.WhichOneof("message") == "hello"
    assert not hello.HasField("cache_changes")
    if wants:
        told = (await call.next_message()).cache_changes
        assert (told.forgets_all, told.published, told.evicted) == (True, b"a" * 16 + b"b" * 16, b"")
    sessions.update_cache(CacheChanges(published=(b"c" * 16,), evicted=(b"a" * 16,)))
    sessions.update_load(WorkerLoad(num_running=1))
    sessions.broadcast_load()
    changed = await call.next_message()
    assert changed.load.num_running == 1
    assert changed.HasField("cache_changes") == wants
    assert (changed.cache_changes.published, changed.cache_changes.evicted) == (
        (b"c" * 16, b"a" * 16) if wants else (b"", b"")
    )
    serving.cancel()
    await asyncio.wait([serving])
