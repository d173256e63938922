"""What the store must get of one request: record, transitions, frames or only their count."""

import time
from collections import deque
from dataclasses import dataclass, replace

from gateway.lifecycle.generation_request import GenerationRequest
from gateway.streaming.output_log import RequestOutput
from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.core.trace_context import TraceContext, log_fields
from kvrelay.errors import KvrelayError
from kvrelay.state.request_record import RequestRecord

MAX_FRAMES_PER_WRITE = 256
COUNT_INTERVAL_S = 1.0
"""Between two writes of a count, which only people look at."""


@dataclass(frozen=True, slots=True)
class StateTransition:
    """A retry has `attempt` = `from_attempt` + 1."""

    state: RequestState
    from_attempt: int
    attempt: int
    fields: dict[str, str | int]


class RequestJournal:
    """Filled by the request's runner, emptied by the state writer.

    `created`: the store has record and frames already. `deadline` is in monotonic seconds.
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
        self._num_written_tokens = output.num_output_tokens if created else 0
        self._written_at = 0.0
        self.transitions: deque[StateTransition] = deque()
        self.terminal: StateTransition | None = None
        self.released = False
        """Another gateway owns or may take the request: ending here does not end it."""
        self.trace = trace
        self._initial_record = record
        self._record = record
        self._deadline = deadline

    @property
    def request_id(self) -> str:
        return self._record.request_id

    @property
    def log_fields(self) -> dict[str, str | int]:
        return log_fields(self._record.request_id, self._record.attempt, self.trace)

    @property
    def ended(self) -> bool:
        return self.terminal is not None

    @property
    def record(self) -> RequestRecord:
        remaining_ms = max(int((self._deadline - time.monotonic()) * 1000), 0)
        return replace(self._record, remaining_ms=remaining_ms, num_output_tokens=self.output.num_output_tokens)

    def add_transition(
        self, state: RequestState, attempt: int, decode_worker_id: str | None, prefill_worker_id: str | None
    ) -> None:
        fields: dict[str, str | int] = {
            "decode_worker_id": decode_worker_id or "",
            "prefill_worker_id": prefill_worker_id or "",
        }
        self.transitions.append(self._change(state, attempt, fields))

    def end(self, state: RequestState, error: KvrelayError | None) -> None:
        """All frames must be in the output."""
        assert is_terminal(state), "an end is final"
        fields: dict[str, str | int] = {"num_output_tokens": self.output.num_output_tokens}
        if error is not None:
            fields |= {"error_message": error.message, "error_reason": error.reason}
        self.terminal = self._change(state, self._record.attempt, fields)

    def record_to_create(self) -> RequestRecord:
        """As it was at first; its transitions follow."""
        return replace(self._initial_record, remaining_ms=self.record.remaining_ms)

    def record_to_restore(self) -> RequestRecord:
        """As it is now, with all transitions."""
        self.transitions.clear()
        return self.record

    def _change(self, state: RequestState, attempt: int, fields: dict[str, str | int]) -> StateTransition:
        transition = StateTransition(state, self._record.attempt, attempt, fields)
        self._record = replace(
            self._record,
            state=state,
            attempt=attempt,
            update_time_ms=int(time.time() * 1000),
            **fields,  # type: ignore[arg-type]
        )
        return transition

    def next_frames(self) -> list[bytes]:
        if not self._record.keeps_output:
            return []
        begin = self.num_written_frames
        return [frame.data for frame in self.output.frames[begin : begin + MAX_FRAMES_PER_WRITE]]

    def all_frames(self) -> list[bytes]:
        return [frame.data for frame in self.output.frames] if self._record.keeps_output else []

    def on_written(self, num_frames: int, num_output_tokens: int) -> None:
        self.num_written_frames = num_frames
        self._num_written_tokens = num_output_tokens
        self._written_at = time.monotonic()

    @property
    def lacks_output(self) -> bool:
        if self._record.keeps_output:
            return self.num_written_frames < len(self.output.frames)
        # The terminal has the last count.
        if self.ended or time.monotonic() - self._written_at < COUNT_INTERVAL_S:
            return False
        return self._num_written_tokens < self.output.num_output_tokens

    @property
    def dirty(self) -> bool:
        return not self.created or bool(self.transitions) or self.lacks_output or self.terminal is not None


def new_record(request: GenerationRequest, gateway_id: str) -> RequestRecord:
    now_ms = int(time.time() * 1000)
    remaining_ms = max(int((request.deadline - time.monotonic()) * 1000), 1)
    return RequestRecord(
        request_id=request.request_id,
        state=RequestState.QUEUED,
        attempt=1,
        tenant=request.tenant,
        model=request.model,
        gateway_id=gateway_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        create_time_ms=now_ms,
        update_time_ms=now_ms,
        deadline_time_ms=now_ms + remaining_ms,
        remaining_ms=remaining_ms,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        cache_salt=request.cache_salt,
        resumable=request.resumable,
        keeps_output=request.keeps_output,
    )
