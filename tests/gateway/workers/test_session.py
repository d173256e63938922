"""A session leaves nothing behind, however it ends."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from gateway.workers import session as session_module
from gateway.workers import session_messages
from gateway.workers.session import SessionSettings, WorkerSession
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.member import MemberRole
from kvrelay.network.rpc import create_channel
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, session_pb2
from kvrelay.wire.convert import model_to_pb
from tests.support.arrival import EndWatch, watching_ends
from tests.support.fake_workers import MODEL
from tests.support.redis_fixtures import eventually

NUM_MESSAGES = 50


class Worker(decode_pb2_grpc.DecodeServiceServicer):
    """On a signal, sends a lot and ends the session."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.dies = False

    def Session(self, request_iterator: Any, context: Any) -> Iterator[decode_pb2.DecodeServiceSessionResponse]:
        next(request_iterator)
        hello = session_pb2.WorkerHello(
            worker_id="decode-1",
            protocol_version=PROTOCOL_VERSION,
            model=model_to_pb(MODEL),
            block_size=16,
            max_sequence_tokens=1024,
        )
        yield decode_pb2.DecodeServiceSessionResponse(hello=hello)
        assert self.may_end.wait(60)
        if self.dies:
            context.abort(grpc.StatusCode.UNAVAILABLE, "its last words")
        for number in range(NUM_MESSAGES):
            yield decode_pb2.DecodeServiceSessionResponse(heartbeat=session_pb2.Heartbeat(number=number))


@pytest.fixture
def worker() -> Iterator[tuple[Worker, EndWatch]]:
    """In its own threads, so that it runs while the test's loop is blocked."""
    server, servicer = grpc.server(ThreadPoolExecutor(2)), Worker()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with watching_ends(port) as ends:
        yield servicer, ends
    servicer.may_end.set()
    server.stop(None).wait(5)


def num_calls_under_way() -> int:
    """Calls whose status gRPC waits for."""
    names = (getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    return sum("_handle_status_once_received" in name for name in names)


async def test_a_session_that_ends_while_the_event_loop_is_blocked_ends_its_call(
    worker: tuple[Worker, EndWatch],
) -> None:
    servicer, ends = worker
    async with create_channel(ends.address) as channel:
        settings = SessionSettings("gateway-1", liveness_window_ms=10000)
        session = WorkerSession(MemberRole.DECODE, ends.address, channel, settings, lambda *_: None)
        greeted = asyncio.Event()
        running = asyncio.create_task(session.run(lambda _: greeted.set()))
        await asyncio.wait_for(greeted.wait(), 30)
        assert num_calls_under_way() == 1
        for number in range(NUM_MESSAGES):
            session.send(session_messages.heartbeat(MemberRole.DECODE, number))
        servicer.may_end.set()
        assert ends.has_arrived.wait(30), "the loop stands still meanwhile"
        assert await asyncio.wait_for(running, 30)

        async def has_ended() -> bool:
            return num_calls_under_way() == 0

        await eventually(has_ended)


async def test_a_worker_that_does_not_read_its_commands_loses_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_QUEUED_COMMANDS", 2)
    async with create_channel("127.0.0.1:9") as channel:
        settings = SessionSettings("gateway-1", liveness_window_ms=10000)
        session = WorkerSession(MemberRole.DECODE, "127.0.0.1:9", channel, settings, lambda *_: None)
        for number in range(5):
            session.send(session_messages.heartbeat(MemberRole.DECODE, number))
        assert session._outbox.qsize() == 2
        assert await asyncio.wait_for(session._until_ended(), 30) == "it left 2 commands unread"


@pytest.mark.parametrize("number", range(5))  # once in three times nothing is written in between
async def test_a_worker_that_dies_while_commands_go_to_it_has_died(
    worker: tuple[Worker, EndWatch], number: int
) -> None:
    servicer, ends = worker
    servicer.dies = True
    async with create_channel(ends.address) as channel:
        settings = SessionSettings("gateway-1", liveness_window_ms=10000)
        session = WorkerSession(MemberRole.DECODE, ends.address, channel, settings, lambda *_: None)
        greeted = asyncio.Event()
        running = asyncio.create_task(session.run(lambda _: greeted.set()))
        await asyncio.wait_for(greeted.wait(), 30)
        for heartbeat in range(NUM_MESSAGES):
            session.send(session_messages.heartbeat(MemberRole.DECODE, heartbeat))
        servicer.may_end.set()
        assert ends.has_arrived.wait(30), "the loop stands still meanwhile"
        assert await asyncio.wait_for(running, 30) == "UNAVAILABLE: its last words"
        assert session.died
