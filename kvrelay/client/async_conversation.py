"""A conversation over one Converse stream."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Self, Unpack

from kvrelay.client import async_transport as transport
from kvrelay.client.addresses import Addresses
from kvrelay.client.async_stream import StubOf
from kvrelay.client.requests import Message, SamplingOptions
from kvrelay.client.results import Accepted, Completion, Delta, Finished, event_from_pb
from kvrelay.client.stream_state import StreamState, call_error
from kvrelay.errors import CancelledRequestError, DeadlineError, UnavailableError
from kvrelay.v1.inference_pb2 import ConverseRequest

TURN_GRACE_S = 2.0
"""The gateway ends a turn at its timeout; the client this much later."""
MAX_CONVERSATION_S = 24 * 3600.0


class AsyncTurn:
    """One turn's answer: `async for delta in turn`."""

    def __init__(
        self, call: transport.ConverseCall, request: ConverseRequest, addresses: Addresses, timeout_s: float
    ) -> None:
        self._call = call
        self._request = request
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._state = StreamState()
        self._deltas = self._run()

    @property
    def accepted(self) -> Accepted | None:
        """None until the first delta."""
        return self._state.accepted

    @property
    def finished(self) -> Finished | None:
        """None until the end."""
        return self._state.finished

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def text(self) -> str:
        """Reads to the end and returns the answer."""
        async for _ in self:
            pass
        return self._state.text()

    async def completion(self) -> Completion:
        """Reads to the end and returns the whole result."""
        async for _ in self:
            pass
        return self._state.completion()

    async def _run(self) -> AsyncGenerator[Delta, None]:
        try:
            await self._call.begin_turn(self._request, self._timeout_s + TURN_GRACE_S)
            while self._state.finished is None:
                message = await self._call.read()
                if message is None:
                    raise UnavailableError("the conversation ended before the turn's last message")
                delta = self._state.take(event_from_pb(message))
                if delta is not None:
                    yield delta
        except TimeoutError:
            raise DeadlineError("the turn was not answered within its timeout") from None
        except transport.RpcError as failure:
            # Frames hold the call, and so the connection.
            raise call_error(failure.with_traceback(None), self._addresses.all) from None
        except transport.CallOverError:
            raise CancelledRequestError("the conversation is over; begin a new one") from None
        finally:
            self._call.end_turn()
            if self._state.finished is None:
                self._call.cancel()


class AsyncConversation:
    """Turns and their answers, one at a time.

        async with client.converse() as conversation:
            async for delta in conversation.send("Hello"):
                print(delta.text, end="")

    A turn that fails or is left early ends the conversation.
    """

    def __init__(
        self,
        stub: StubOf,
        addresses: Addresses,
        make_request: Callable[..., ConverseRequest],
        timeout_s: float,
        sampling: SamplingOptions,
    ) -> None:
        self._stub = stub
        self._addresses = addresses
        self._make_request = make_request
        self._timeout_s = timeout_s
        self._sampling = sampling
        self._call: transport.ConverseCall | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the conversation and its running turn."""
        if self._call is not None:
            self._call.cancel()

    def send(
        self, messages: str | Iterable[Message], *, timeout_s: float | None = None, **sampling: Unpack[SamplingOptions]
    ) -> AsyncTurn:
        """Makes a turn of the user's text, or of messages. The first read sends it.

        Args:
            messages: appended to earlier turns and their answers.
            **sampling: for this turn and later ones.

        Raises:
            InvalidRequestError: an argument is invalid. Reading the turn raises all other errors.
        """
        timeout_s = timeout_s or self._timeout_s
        self._sampling = {**self._sampling, **sampling}
        request = self._make_request(messages, sampling=self._sampling, timeout_ms=int(timeout_s * 1000))
        if self._call is None:
            self._call = transport.ConverseCall(self._stub(self._addresses.current), MAX_CONVERSATION_S)
        return AsyncTurn(self._call, request, self._addresses, timeout_s)
