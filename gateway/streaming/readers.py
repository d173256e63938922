"""The readers of a request's output, and when the request must wait for them."""

from collections.abc import AsyncIterator
from typing import Protocol

from gateway.streaming.frames import Frame
from gateway.streaming.output_log import RequestOutput
from gateway.streaming.write_throttle import WriteThrottle
from kvrelay.errors import KvrelayError


class ReadRequest(Protocol):
    output: RequestOutput
    throttle: WriteThrottle

    def on_read(self, reader: "OutputReader") -> None: ...

    def close_reader(self, reader: "OutputReader") -> None: ...


class OutputReader:
    """One client's view of a request's output.

    Closing drops the reference to the request, because gRPC may keep the reader for long.
    """

    def __init__(self, request: ReadRequest, from_index: int) -> None:
        self._request: ReadRequest | None = request
        self._from_index = from_index
        self._error: KvrelayError | None = None
        self.num_read = 0
        """Frames sent to the client."""

    def batches(self, coalesce_s: float = 0.0) -> AsyncIterator[list[Frame]]:
        """See `RequestOutput.read`."""
        assert self._request is not None, "closed"
        return self._request.output.read(self._from_index, coalesce_s, self._request.throttle, self._on_read)

    def _on_read(self, num_read: int) -> None:
        self.num_read = num_read
        if self._request is not None:
            self._request.on_read(self)

    def close(self) -> None:
        """Idempotent."""
        request, self._request = self._request, None
        if request is not None:
            self._error = request.output.error
            request.close_reader(self)
        if self._error is not None:
            # The error outlives the request. Drop its traceback, which would keep the stack frames
            # alive; again at every close, because later readers re-raise it.
            self._error.__traceback__ = None


class OutputReaders:
    """All readers of one request; the fastest decides.

    Above `max_unread_tokens` the request must wait; at half of it the request may go on.
    """

    def __init__(self, output: RequestOutput, max_unread_tokens: int) -> None:
        self._output = output
        self._max_unread_tokens = max_unread_tokens
        self._readers: set[OutputReader] = set()
        self._num_read = 0

    def __bool__(self) -> bool:
        return bool(self._readers)

    def add(self, reader: OutputReader) -> None:
        self._readers.add(reader)

    def remove(self, reader: OutputReader) -> None:
        self._readers.discard(reader)
        self._num_read = max((other.num_read for other in self._readers), default=0)

    def on_read(self, reader: OutputReader) -> None:
        self._num_read = max(self._num_read, reader.num_read)

    @property
    def are_behind(self) -> bool:
        return self._num_unread > self._max_unread_tokens and bool(self._readers)

    @property
    def have_caught_up(self) -> bool:
        return self._num_unread <= self._max_unread_tokens // 2

    @property
    def _num_unread(self) -> int:
        return len(self._output.frames) - self._num_read
