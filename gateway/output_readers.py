"""Who reads a request's output, and how far they are: when the request is to wait for them. Knows nothing of how it waits."""

from collections.abc import AsyncIterator
from typing import Protocol

from gateway.output_frames import Frame
from gateway.request_output import RequestOutput
from gateway.turnstile import Turnstile
from kvrelay.errors import KvrelayError


class ReadRequest(Protocol):
    """A request that is read."""

    output: RequestOutput
    turnstile: Turnstile

    def note_read(self, reader: "OutputReader") -> None:
        """A reader has got further."""

    def close_reader(self, reader: "OutputReader") -> None:
        """A reader reads no more."""


class OutputReader:
    """One client's view of a request's output. Once closed it knows the request no more: gRPC may keep it for long."""

    def __init__(self, request: ReadRequest, from_index: int) -> None:
        self._request: ReadRequest | None = request
        self._from_index = from_index
        self._error: KvrelayError | None = None
        self.num_read = 0
        """Frames that the client has been sent, as far as its connection takes them."""

    def batches(self, coalesce_s: float = 0.0) -> AsyncIterator[list[Frame]]:
        """Frames until the end, as `RequestOutput.read` has them."""
        assert self._request is not None, "closed"
        return self._request.output.read(self._from_index, coalesce_s, self._request.turnstile, self._note_read)

    def _note_read(self, num_read: int) -> None:
        self.num_read = num_read
        if self._request is not None:
            self._request.note_read(self)

    def close(self) -> None:
        """The client is gone, or has it all. Idempotent."""
        request, self._request = self._request, None
        if request is not None:
            self._error = request.output.error
            request.close_reader(self)
        if self._error is not None:
            # It is kept for as long as the ended request is known, and the frames it came through would be kept with it. Each
            # time, for it goes on through some of them after the first.
            self._error.__traceback__ = None


class OutputReaders:
    """All readers of one request. Those who read fast decide for all.

    Args:
        output: what is read.
        max_unread_tokens: before the request is to wait; it may go on when half of them are read.
    """

    def __init__(self, output: RequestOutput, max_unread_tokens: int) -> None:
        self._output = output
        self._max_unread_tokens = max_unread_tokens
        self._readers: set[OutputReader] = set()
        self._num_read = 0
        """Frames that the reader furthest on is done with."""

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._readers)

    def add(self, reader: OutputReader) -> None:
        self._readers.add(reader)

    def remove(self, reader: OutputReader) -> None:
        self._readers.discard(reader)
        self._num_read = max((other.num_read for other in self._readers), default=0)

    def note_read(self, reader: OutputReader) -> None:
        self._num_read = max(self._num_read, reader.num_read)

    @property
    def are_behind(self) -> bool:
        """Whether the request is to wait."""
        return self._num_unread > self._max_unread_tokens and bool(self._readers)

    @property
    def have_caught_up(self) -> bool:
        """Whether it may go on."""
        return self._num_unread <= self._max_unread_tokens // 2

    @property
    def _num_unread(self) -> int:
        return len(self._output.frames) - self._num_read
