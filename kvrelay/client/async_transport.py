"""gRPC and waiting for the asyncio client. `sync_transport` has the same names for threads."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeAlias

import grpc

from kvrelay.network import rpc
from kvrelay.network.connection_pool import PooledChannel
from kvrelay.network.first_status import FirstStatus
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.v1 import inference_pb2_grpc
from kvrelay.v1.inference_pb2 import ConverseRequest

Channel = grpc.aio.Channel
RpcError = grpc.aio.AioRpcError
Stub: TypeAlias = "inference_pb2_grpc.InferenceServiceAsyncStub"
UnaryMethod = grpc.aio.UnaryUnaryMultiCallable

sleep = asyncio.sleep

CallOverError = asyncio.InvalidStateError


def create_channel(address: str, *, use_proxy: bool, credentials: ChannelCredentials | None) -> Channel:
    return PooledChannel(partial(rpc.create_channel, address, use_proxy=use_proxy, credentials=credentials))


class StreamCall:
    """Keeps gRPC's call, and so its connection, until `cancel`."""

    def __init__(self, call: Any) -> None:
        self._call: Any = call

    async def read(self) -> Any:
        """The next message. None after the last one, and after `cancel`."""
        if self._call is None:
            return None
        try:
            # Not `async for`: a call and its iterator hold each other, and so the connection.
            message = await self._call.read()
        except asyncio.CancelledError:
            if self._call is not None:  # the task was cancelled, not the call
                raise
            return None
        return None if message is grpc.aio.EOF else message

    def cancel(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


class ConverseCall:
    """For each turn: `begin_turn`, `read` its messages, `end_turn`."""

    def __init__(self, stub: Stub, timeout_s: float) -> None:
        self._call: Any = stub.Converse(timeout=timeout_s)
        self._status = FirstStatus(self._call)
        self._turn_deadline_s = 0.0

    async def begin_turn(self, request: ConverseRequest, timeout_s: float) -> None:
        """Sends a turn and sets its timeout. Raises TimeoutError."""
        self._turn_deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(RpcError, asyncio.InvalidStateError):  # `read` raises what ended the call
            await self._within_turn(self._open_call().write(request))

    async def read(self) -> Any:
        """The next message. None when the gateway ended the call.

        Raises TimeoutError for a late turn, and CallOverError after `cancel`.
        """
        message = await self._within_turn(self._open_call().read())
        return None if message is grpc.aio.EOF else message

    def end_turn(self) -> None:
        """Each read has its own timeout."""

    def cancel(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def _open_call(self) -> Any:
        if self._call is None:
            raise CallOverError
        return self._call

    async def _within_turn(self, operation: Coroutine[Any, Any, Any]) -> Any:
        remaining_s = max(0.0, self._turn_deadline_s - time.monotonic())
        try:
            return await asyncio.wait_for(operation, remaining_s)
        except asyncio.CancelledError:
            if self._call is not None:  # the task was cancelled, not the call
                raise
            raise CallOverError from None
        except (RpcError, asyncio.InvalidStateError) as failure:
            # Its frames hold the call, and so the connection.
            cause = self._status.cause_of(failure.with_traceback(None))
        if cause is not None:
            raise cause
        return grpc.aio.EOF
