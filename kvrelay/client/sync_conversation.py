"""A conversation over one Converse stream, for threads: turns go in, each is answered by deltas."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import grpc

from kvrelay.client import requests
from kvrelay.client.addresses import Addresses
from kvrelay.client.async_conversation import MAX_CONVERSATION_S, TURN_GRACE_S
from kvrelay.client.results import Accepted, Completion, Delta, Finished, event_from_pb
from kvrelay.client.stream_state import StreamState, call_error
from kvrelay.client.sync_stream import StubOf
from kvrelay.errors import DeadlineError, UnavailableError
from kvrelay.v1.inference_pb2 import ConverseRequest

_Requests = queue.SimpleQueue[ConverseRequest | None]


class Turn:
    """One turn's answer: `for delta in turn`."""

    def __init__(self, call: Any, send: Callable[[], None], addresses: Addresses, timeout_s: float) -> None:
        self._call = call
        self._send = send
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._state = StreamState()
        self._timed_out = threading.Event()
        self._deltas = self._run()

    @property
    def accepted(self) -> Accepted | None:
        """The turn's request id; None until the first delta."""
        return self._state.accepted

    @property
    def finished(self) -> Finished | None:
        """Usage and phases; None until the iteration is over."""
        return self._state.finished

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def text(self) -> str:
        """Reads the turn to its end; the whole answer."""
        for _ in self:
            pass
        return self._state.text()

    def completion(self) -> Completion:
        """Reads the turn to its end; the whole result."""
        for _ in self:
            pass
        return self._state.completion()

    def _run(self) -> Generator[Delta, None, None]:
        # gRPC's blocking streams have no timeout for one message: a timer ends the call instead.
        timer = threading.Timer(self._timeout_s + TURN_GRACE_S, self._end_late_turn)
        timer.daemon = True
        timer.start()
        try:
            self._send()
            while self._state.finished is None:
                message = next(self._call, None)
                if message is None:
                    raise UnavailableError("the conversation ended before the turn's last message")
                delta = self._state.take(event_from_pb(message))
                if delta is not None:
                    yield delta
        except grpc.RpcError as failure:
            if self._timed_out.is_set():
                raise DeadlineError("the turn was not answered within its timeout") from None
            raise call_error(failure, self._addresses.all) from None
        finally:
            timer.cancel()
            if self._state.finished is None:
                self._call.cancel()

    def _end_late_turn(self) -> None:
        self._timed_out.set()
        self._call.cancel()


class Conversation:
    """`with client.converse() as conversation: for delta in conversation.send("Hello")`.

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
        self._stub = stub
        self._addresses = addresses
        self._model = model
        self._tenant = tenant
        self._coalesce_ms = coalesce_ms
        self._timeout_s = timeout_s
        self._sampling = dict(sampling)
        self._requests: _Requests = queue.SimpleQueue()
        self._call: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the conversation and a turn that is being answered."""
        self._requests.put(None)
        if self._call is not None:
            self._call.cancel()

    def send(self, messages: str | Iterable[requests.Message], *, timeout_s: float | None = None, **sampling: Any) -> Turn:
        """Sends a turn: a text of the user's, or messages. It goes out with the first item that is asked for.

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
            # gRPC reads this iterator in a thread of its own, which ends with the None that `close` puts.
            stub = self._stub(self._addresses.current)
            self._call = stub.Converse(iter(self._requests.get, None), timeout=MAX_CONVERSATION_S)
        return Turn(self._call, lambda: self._requests.put(request), self._addresses, timeout_s)
