"""What handoffs from a prefill worker have cost. Pure; times are monotonic seconds.

prefill      |------------------------|
on the wire       |===========================|
exposed                               |--tail-|
"""

from dataclasses import dataclass, field

from kvrelay.core.job import JobId
from kvrelay.core.prompt_pace import HeldMedian

MAX_RECEIVERS = 256
LIFETIME_S = 300.0
"""A measurement is then too old: what was slow may have become fast without anybody's notice."""


@dataclass(frozen=True, slots=True)
class HandoffCost:
    tokens_per_s: float
    tail_s: float

    def seconds(self, num_tokens: int, prefill_s: float) -> float:
        """The exposed part, after the prompt's own `prefill_s`."""
        return self.tail_s + max(0.0, num_tokens / self.tokens_per_s - prefill_s)


@dataclass(slots=True)
class _Receiver:
    measured_at: float = 0.0
    rate: HeldMedian = field(default_factory=HeldMedian)
    tail_s: HeldMedian = field(default_factory=HeldMedian)


class HandoffCosts:
    """From one prefill worker to all decode workers."""

    def __init__(self) -> None:
        self._running: dict[JobId, tuple[str, int]] = {}
        """Decode worker, and tokens to send."""
        self._receivers: dict[str, _Receiver] = {}

    def begin(self, job_id: JobId, decode_worker_id: str, num_tokens: int) -> None:
        self._running[job_id] = (decode_worker_id, num_tokens)

    def discard(self, job_id: JobId) -> None:
        self._running.pop(job_id, None)

    def record(self, job_id: JobId, transfer_ms: float, exposed_ms: float, wire_ms: float, now: float) -> None:
        decode_worker_id, num_tokens = self._running.pop(job_id, ("", 0))
        if num_tokens == 0 or not wire_ms > 0.0:
            return
        hidden_ms = transfer_ms - exposed_ms
        receiver = self._receivers.pop(decode_worker_id, None) or _Receiver()
        self._receivers[decode_worker_id] = receiver  # the last one used is the last one dropped
        if len(self._receivers) > MAX_RECEIVERS:
            del self._receivers[next(iter(self._receivers))]
        receiver.measured_at = now
        receiver.rate.add(num_tokens / wire_ms * 1000, num_tokens)
        receiver.tail_s.add(max(0.0, exposed_ms - max(0.0, wire_ms - hidden_ms)) / 1000)

    def to(self, decode_worker_id: str, now: float) -> HandoffCost | None:
        """None: not measured, or long ago."""
        receiver = self._receivers.get(decode_worker_id)
        if receiver is None or now - receiver.measured_at > LIFETIME_S:
            return None
        rate, tail_s = receiver.rate.value, receiver.tail_s.value
        return HandoffCost(rate, tail_s) if rate and tail_s is not None else None
