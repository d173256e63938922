"""Times of one request at the gateway, and its phases. Pure."""

from gateway.lifecycle.attempt import AttemptReport
from kvrelay.core.timeline import Phases


class PhaseClock:
    """Takes monotonic seconds."""

    def __init__(self, submit_time: float) -> None:
        self._submit_time = submit_time
        self._prompt_sent: float | None = None
        self._first_token: float | None = None
        self._second_token: float | None = None
        self._last_token: float | None = None
        self._last_of_sequence: dict[int, float] = {}

    def on_prompt_sent(self, now: float) -> None:
        """The last time before the first token counts."""
        if self._first_token is None:
            self._prompt_sent = now

    def on_token(self, sequence: int, index: int, now: float) -> float | None:
        """Returns the seconds since the sequence's token before, if any."""
        if self._first_token is None:
            self._first_token = now
        if self._second_token is None and sequence == 0 and index == 1:
            self._second_token = now
        self._last_token = now
        before = self._last_of_sequence.get(sequence)
        self._last_of_sequence[sequence] = now
        return None if before is None else now - before

    def phases(self, report: AttemptReport, num_attempts: int, now: float) -> Phases:
        return Phases(
            queue_ms=_ms(self._submit_time, self._prompt_sent) + report.queue_ms,
            prefill_ms=report.prefill_ms,
            transfer_ms=report.transfer_ms,
            exposed_transfer_ms=report.exposed_ms,
            transfer_wire_ms=report.wire_ms,
            transfer_bytes=report.transfer_bytes,
            transfer_transport=report.transport,
            handoff_gap_ms=_ms(self._first_token, self._second_token),
            decode_ms=_ms(self._first_token, self._last_token),
            time_to_first_token_ms=_ms(self._submit_time, self._first_token),
            total_ms=_ms(self._submit_time, now),
            num_attempts=num_attempts,
            prefilled_on_decode_worker=report.prefilled_on_decode_worker,
            prefill_worker_id=report.prefill_worker_id or "",
            decode_worker_id=report.decode_worker_id or "",
        )


def _ms(begin: float | None, end: float | None) -> float:
    return 0.0 if begin is None or end is None else (end - begin) * 1000
