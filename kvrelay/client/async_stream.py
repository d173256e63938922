"""One request's output as an iterator that survives lost connections."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import time
import types
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Self, cast

import grpc

from kvrelay.client import async_transport as transport
from kvrelay.client.addresses import Addresses
from kvrelay.client.results import Accepted, Completion, Delta, Finished, event_from_pb
from kvrelay.client.stream_state import Recovery, StreamRequest, StreamState
from kvrelay.errors import CancelledRequestError, DeadlineError
from kvrelay.v1 import inference_pb2

StubOf = Callable[[str], transport.Stub]


class AsyncStream:
    """A request's deltas: `async for delta in stream`, by one reader.

    To leave it early, use `cancel()` or `async with`.
    """

    def __init__(
        self,
        stub: StubOf,
        addresses: Addresses,
        request: StreamRequest,
        state: StreamState,
        resumable: bool,
        timeout_s: float,
    ) -> None:
        self._stub = stub
        self._addresses = addresses
        self._request = request
        self._state = state
        can_begin_again = isinstance(request, inference_pb2.GenerateRequest)
        self._recovery = Recovery(resumable, addresses.all, can_begin_again=can_begin_again)
        self._timeout_s = timeout_s
        self._call: transport.StreamCall | None = None
        self._cancelled = False
        self._deltas = self._run()

    @property
    def accepted(self) -> Accepted | None:
        """Id, model and seed. None until the first delta."""
        return self._state.accepted

    @property
    def finished(self) -> Finished | None:
        """Usage and phases. None until the end."""
        return self._state.finished

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        await self.cancel()

    async def text(self) -> str:
        """Reads to the end and returns the first sequence's text."""
        async for _ in self:
            pass
        return self._state.text()

    async def completion(self) -> Completion:
        """Reads to the end and returns the whole result."""
        async for _ in self:
            pass
        return self._state.completion()

    async def cancel(self) -> None:
        """Ends the stream and, unless it is resumable, its request.

        A reader that waits for a delta gets CancelledRequestError.
        """
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()
        if not cast("types.AsyncGeneratorType[Delta, None]", self._deltas).ag_running:
            await self._deltas.aclose()

    async def _run(self) -> AsyncGenerator[Delta, None]:
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            failure: grpc.RpcError | None = None
            self._call = self._open(deadline_s - time.monotonic())
            try:
                while (message := await self._call.read()) is not None:
                    delta = self._state.take(event_from_pb(message))
                    self._recovery.received(new=delta is not None)
                    if delta is not None:
                        yield delta
                    if self._state.finished is not None:
                        return
            except transport.RpcError as error:
                failure = error.with_traceback(None)  # whose frames hold the call, and so the connection
            finally:
                self._call.cancel()
            self._raise_if_cancelled()
            await transport.sleep(self._recovery.delay_s(failure, deadline_s - time.monotonic()))
            self._addresses.move_on()

    def _raise_if_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledRequestError("the stream was cancelled by this client")

    def _open(self, remaining_s: float) -> transport.StreamCall:
        self._raise_if_cancelled()
        if remaining_s <= 0:
            raise DeadlineError("no answer within the timeout")
        stub = self._stub(self._addresses.current)
        request = self._state.next_request(self._request, is_lost=self._recovery.request_is_lost)
        if isinstance(request, inference_pb2.ResumeRequest):
            return transport.StreamCall(stub.Resume(request, timeout=remaining_s))
        return transport.StreamCall(stub.Generate(request, timeout=remaining_s))
