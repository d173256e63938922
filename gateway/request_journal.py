"""What is to be kept of one request: its record, its moves and its frames, and how much of that the store has. Knows no store."""

import time
from collections import deque
from dataclasses import dataclass, replace

from gateway.request_output import RequestOutput
from kvrelay.errors import KvrelayError
from kvrelay.request_record import RequestRecord
from kvrelay.request_state import RequestState, is_terminal
from kvrelay.trace_context import TraceContext, log_fields

MAX_FRAMES_PER_WRITE = 256


@dataclass(frozen=True, slots=True)
class Move:
    """One transition: `from_attempt` differs from `attempt` when the request is tried again."""

    state: RequestState
    from_attempt: int
    attempt: int
    fields: dict[str, str | int]


class RequestJournal:
    """Filled by the request's runner, emptied by the state writer.

    Args:
        record: as it is now.
        output: the request's frames.
        deadline: monotonic seconds.
        created: whether the store has the record already, with all frames there are.
        trace: that its client named.
    """

    def __init__(
        self,
        record: RequestRecord,
        output: RequestOutput,
        deadline: float,
        *,
        created: bool = False,
        trace: TraceContext | None = None,
    ) -> None:
        self.output = output
        self.created = created
        self.num_written_frames = len(output.frames) if created else 0
        self.moves: deque[Move] = deque()
        self.terminal: Move | None = None
        self.released = False
        """Another gateway has the request, or may take it: it goes on there, and its end here is none."""
        self._initial_record = record
        self._record = record
        self._deadline = deadline
        self._trace = trace

    @property
    def request_id(self) -> str:
        return self._record.request_id

    @property
    def log_fields(self) -> dict[str, str | int]:
        """What a line of the log about it has."""
        return log_fields(self._record.request_id, self._record.attempt, self._trace)

    @property
    def ended(self) -> bool:
        """Whether nothing more will be written into it."""
        return self.terminal is not None

    @property
    def record(self) -> RequestRecord:
        """The request as it is now."""
        remaining_ms = max(int((self._deadline - time.monotonic()) * 1000), 0)
        return replace(self._record, remaining_ms=remaining_ms, num_output_tokens=self.output.num_output_tokens)

    def move(self, state: RequestState, attempt: int, decode_worker_id: str | None, prefill_worker_id: str | None) -> None:
        """The request moved along an edge."""
        fields: dict[str, str | int] = {
            "decode_worker_id": decode_worker_id or "",
            "prefill_worker_id": prefill_worker_id or "",
        }
        self.moves.append(self._change(state, attempt, fields))

    def end(self, state: RequestState, error: KvrelayError | None) -> None:
        """The request ended; all its frames are in its output."""
        assert is_terminal(state), "an end is final"
        fields: dict[str, str | int] = {"num_output_tokens": self.output.num_output_tokens}
        if error is not None:
            fields |= {"error_message": error.message, "error_reason": error.reason}
        self.terminal = self._change(state, self._record.attempt, fields)

    def record_to_create(self) -> RequestRecord:
        """The record as it was at first; its moves follow."""
        return replace(self._initial_record, remaining_ms=self.record.remaining_ms)

    def record_to_restore(self) -> RequestRecord:
        """The record as it is now; moves up to now are part of it."""
        self.moves.clear()
        return self.record

    def _change(self, state: RequestState, attempt: int, fields: dict[str, str | int]) -> Move:
        move = Move(state, self._record.attempt, attempt, fields)
        self._record = replace(
            self._record,
            state=state,
            attempt=attempt,
            update_time_ms=int(time.time() * 1000),
            **fields,  # type: ignore[arg-type]
        )
        return move

    def next_frames(self) -> list[bytes]:
        """The next frames that the store does not have, as bytes."""
        begin = self.num_written_frames
        return [frame.data for frame in self.output.frames[begin : begin + MAX_FRAMES_PER_WRITE]]

    def all_frames(self) -> list[bytes]:
        return [frame.data for frame in self.output.frames]

    @property
    def dirty(self) -> bool:
        """Whether the store lacks something."""
        lacks_frames = self.num_written_frames < len(self.output.frames)
        return not self.created or bool(self.moves) or lacks_frames or self.terminal is not None
