"""gRPC and waiting for the blocking client. `async_transport` has the same names for asyncio."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import queue
import threading
import time
from functools import partial
from typing import Any, TypeAlias

import grpc

from kvrelay.network import rpc
from kvrelay.network.connection_pool import PooledSyncChannel
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.v1 import inference_pb2_grpc
from kvrelay.v1.inference_pb2 import ConverseRequest

Channel = grpc.Channel
RpcError = grpc.RpcError
Stub: TypeAlias = inference_pb2_grpc.InferenceServiceStub
UnaryMethod = grpc.UnaryUnaryMultiCallable

sleep = time.sleep


class CallOverError(Exception):
    """The conversation's call has ended."""


def create_channel(address: str, *, use_proxy: bool, credentials: ChannelCredentials | None) -> Channel:
    return PooledSyncChannel(partial(rpc.create_sync_channel, address, use_proxy=use_proxy, credentials=credentials))


class StreamCall:
    def __init__(self, call: Any) -> None:
        self._call = call

    def read(self) -> Any:
        """The next message. None after the last one."""
        return next(self._call, None)

    def cancel(self) -> None:
        self._call.cancel()


class ConverseCall:
    """For each turn: `begin_turn`, `read` its messages, `end_turn`."""

    def __init__(self, stub: Stub, timeout_s: float) -> None:
        self._requests: queue.SimpleQueue[ConverseRequest | None] = queue.SimpleQueue()
        # gRPC reads this iterator in its own thread, which ends with the None that `cancel` puts.
        self._call: Any = stub.Converse(iter(self._requests.get, None), timeout=timeout_s)
        self._cancelled = False
        self._timed_out = False
        self._timer: threading.Timer | None = None

    def begin_turn(self, request: ConverseRequest, timeout_s: float) -> None:
        """Sends a turn and starts its timeout."""
        # gRPC's blocking streams have no timeout for one message: a timer ends the call instead.
        self._timer = threading.Timer(timeout_s, self._end_late_turn)
        self._timer.daemon = True
        self._timer.start()
        self._requests.put(request)

    def read(self) -> Any:
        """See `async_transport.ConverseCall.read`."""
        try:
            return next(self._call, None)
        except grpc.RpcError:
            if self._timed_out:
                raise TimeoutError from None
            if self._cancelled:
                raise CallOverError from None
            raise

    def end_turn(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def cancel(self) -> None:
        self._cancelled = True
        self._requests.put(None)
        self._call.cancel()

    def _end_late_turn(self) -> None:
        self._timed_out = True
        self.cancel()
