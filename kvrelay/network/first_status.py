"""How a call ended, also if a write fails later, for which gRPC replaces the status by INTERNAL."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc


class FirstStatus:
    def __init__(self, call: Any) -> None:
        self._has_ended = False
        self._failure: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._keep)

    def cause_of(self, failure: BaseException) -> BaseException | None:
        """Why a read or write failed. None: the peer had ended the call with OK."""
        is_of_call = isinstance(failure, grpc.aio.AioRpcError | asyncio.InvalidStateError)
        return self._failure if is_of_call and self._has_ended else failure

    def _keep(self, call: Any) -> None:
        if self._has_ended:
            return
        self._has_ended, code = True, _now(call.code())
        if code is not grpc.StatusCode.OK:
            metadata, details = _now(call.trailing_metadata()), _now(call.details())
            self._failure = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details)


def _now(answer: Coroutine[Any, Any, Any]) -> Any:
    """Of a call that has ended, so that nothing waits."""
    try:
        answer.send(None)
    except StopIteration as returned:
        return returned.value
    raise AssertionError("the call has ended")
