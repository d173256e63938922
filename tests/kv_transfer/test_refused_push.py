"""A push that the decode worker refuses says why, also if the sender was just writing."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from kvrelay.core.job import JobId
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.transports import GrpcPush, PushPlan
from kvrelay.network.rpc import create_channel
from kvrelay.v1 import kv_transfer_pb2, kv_transfer_pb2_grpc
from tests.support.arrival import EndWatch, watching_ends

PLAN = PushPlan(JobId("0" * 32, 1), b"t" * 16, "fingerprint", 0, 1)


class RefusingReceiver(kv_transfer_pb2_grpc.KVTransferServiceServicer):
    def __init__(self) -> None:
        self.may_end = threading.Event()

    def Push(self, request_iterator: Any, context: Any) -> Iterator[kv_transfer_pb2.PushResponse]:
        next(request_iterator)
        yield kv_transfer_pb2.PushResponse(chunk_accepted=kv_transfer_pb2.ChunkAccepted())
        assert self.may_end.wait(60)
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "not a prefill worker")


@pytest.fixture
def receiver() -> Iterator[tuple[RefusingReceiver, EndWatch]]:
    """In its own threads, so that it runs while the test's loop is blocked."""
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = RefusingReceiver()  # type: ignore[abstract]
    kv_transfer_pb2_grpc.add_KVTransferServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with watching_ends(port) as ends:
        yield servicer, ends
    servicer.may_end.set()
    server.stop(None).wait(5)


async def test_a_refused_push_names_the_decode_workers_reason(receiver: tuple[RefusingReceiver, EndWatch]) -> None:
    servicer, ends = receiver
    async with create_channel(ends.address) as channel:
        push = GrpcPush(channel, 1024)
        await push.send_header(PLAN)
        replies = push.replies()
        await anext(replies)
        servicer.may_end.set()
        assert ends.has_arrived.wait(30), "the loop stands still meanwhile"
        with pytest.raises(TransferError, match="broke the push off: not a prefill worker"):
            await push.send_end(0, ())
        with pytest.raises(TransferError, match="broke the push off: not a prefill worker"):
            await anext(replies)
        push.close(is_complete=False)
