"""A conversation over one Converse stream, for asyncio: turns go in, each is answered by deltas."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc

from kvrelay.client import requests
from kvrelay.client.addresses import Addresses
from kvrelay.client.async_stream import StubOf
from kvrelay.client.results import Accepted, Completion, Delta, Finished, event_from_pb
from kvrelay.client.stream_state import StreamState, call_error
from kvrelay.errors import CancelledRequestError, DeadlineError, UnavailableError

TURN_GRACE_S = 2.0
"""The server ends a turn at its timeout; the client itself only when that did not arrive so much later."""
MAX_CONVERSATION_S = 24 * 3600.0


class AsyncTurn:
    """One turn's answer: `async for delta in turn`."""

    def __init__(self, call: Any, request: Any, addresses: Addresses, timeout_s: float) -> None:
        self._call = call
        self._request = request
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._state = StreamState()
        self._deltas = self._run()

    @property
    def accepted(self) -> Accepted | None:
        """The turn's request id; None until the first delta."""
        return self._state.accepted

    @property
    def finished(self) -> Finished | None:
        """Usage and phases; None until the iteration is over."""
        return self._state.finished

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def text(self) -> str:
        """Reads the turn to its end; the whole answer."""
        async for _ in self:
            pass
        return self._state.text()

    async def completion(self) -> Completion:
        """Reads the turn to its end; the whole result."""
        async for _ in self:
            pass
        return self._state.completion()

    async def _run(self) -> AsyncGenerator[Delta, None]:
        try:
            deadline_s = time.monotonic() + self._timeout_s + TURN_GRACE_S
            await self._call.write(self._request)
            while self._state.finished is None:
                # Each read by itself: a timeout around the yield would cancel the caller's code.
                message = await asyncio.wait_for(self._call.read(), max(0.0, deadline_s - time.monotonic()))
                if message is grpc.aio.EOF:
                    raise UnavailableError("the conversation ended before the turn's last message")
                delta = self._state.take(event_from_pb(message))
                if delta is not None:
                    yield delta
        except TimeoutError:
            raise DeadlineError("the turn was not answered within its timeout") from None
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, self._addresses.all) from None
        except asyncio.InvalidStateError:
            raise CancelledRequestError("the conversation is over; begin a new one") from None
        finally:
            if self._state.finished is None:
                self._call.cancel()


class AsyncConversation:
    """`async with client.converse() as conversation: async for delta in conversation.send("Hello")`.

    One turn at a time. A turn that fails, or is left before its end, ends the conversation.
    """

    def __init__(
        self,
        stub: StubOf,
        addresses: Addresses,
        *,
        model: str,
        tenant: str,
        coalesce_ms: int | None,
        timeout_s: float,
        sampling: Mapping[str, Any],
    ) -> None:
        self._addresses = addresses
        self._model = model
        self._tenant = tenant
        self._coalesce_ms = coalesce_ms
        self._timeout_s = timeout_s
        self._sampling = dict(sampling)
        self._stub = stub
        self._call: Any = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the conversation and a turn that is being answered."""
        if self._call is not None:
            self._call.cancel()

    def send(self, messages: str | Iterable[requests.Message], *, timeout_s: float | None = None, **sampling: Any) -> AsyncTurn:
        """Sends a turn: a text of the user's, or messages.

        Args:
            messages: appended to those of earlier turns and their answers.
            timeout_s: of this turn.
            **sampling: for this turn and those that follow.

        Raises:
            InvalidRequestError: a value cannot be sent. All other errors come with the turn's items.
        """
        timeout_s = timeout_s or self._timeout_s
        self._sampling |= sampling
        request = requests.converse_request(
            messages,
            model=self._model,
            tenant=self._tenant,
            sampling=self._sampling,
            timeout_ms=int(timeout_s * 1000),
            coalesce_ms=self._coalesce_ms,
        )
        if self._call is None:
            self._call = self._stub(self._addresses.current).Converse(timeout=MAX_CONVERSATION_S)
        return AsyncTurn(self._call, request, self._addresses, timeout_s)
