"""Metrics of decode workers only."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from decode_worker.scheduling.events import SequencesStarted, StepReport
from kvrelay.observability.metrics.families import Family, Histogram, Sample

TOKENS = Family("kvrelay_decode_tokens_total", "counter", "Tokens that were sampled.")
STEPS = Family("kvrelay_decode_steps_total", "counter", "Engine steps that gave tokens.")
STARTS = Family(
    "kvrelay_decode_starts_total",
    "counter",
    "Jobs whose sequences began to run; source: push, with KV from a prefill worker, or local.",
    ("source",),
)
BYTES = Family("kvrelay_decode_received_bytes_total", "counter", "KV payload that was received and verified.")
RECEIVED_TOKENS = Family("kvrelay_decode_received_tokens_total", "counter", "Prompt tokens whose KV was received.")
QUEUE = Family(
    "kvrelay_decode_local_queue_seconds", "histogram", "From asking for a prompt to be computed here to its first step."
)
COMPUTE = Family(
    "kvrelay_decode_local_prefill_seconds",
    "histogram",
    "From asking for a prompt to be computed here to its first token.",
)

FAMILIES = (TOKENS, STEPS, STARTS, BYTES, RECEIVED_TOKENS, QUEUE, COMPUTE)


@dataclass(slots=True)
class DecodeMetrics:
    """Used on the event loop."""

    num_tokens: int = 0
    num_steps: int = 0
    num_pushed: int = 0
    num_local: int = 0
    kv_bytes: int = 0
    num_received_tokens: int = 0
    queue: Histogram = field(default_factory=Histogram)
    compute: Histogram = field(default_factory=Histogram)

    def record_report(self, report: StepReport) -> None:
        if report.tokens:
            self.num_steps += 1
            self.num_tokens += len(report.tokens)
        for event in report.events:
            if isinstance(event, SequencesStarted):
                self._record_start(event)

    def _record_start(self, event: SequencesStarted) -> None:
        if event.kv_bytes:
            self.num_pushed += 1
            self.kv_bytes += event.kv_bytes
            self.num_received_tokens += event.num_transferred_tokens
            return
        self.num_local += 1
        self.queue.observe(event.queue_ms / 1000)
        self.compute.observe(event.prefill_ms / 1000)

    def samples(self) -> Iterator[Sample]:
        yield Sample(TOKENS, self.num_tokens)
        yield Sample(STEPS, self.num_steps)
        yield Sample(STARTS, self.num_pushed, ("push",))
        yield Sample(STARTS, self.num_local, ("local",))
        yield Sample(BYTES, self.kv_bytes)
        yield Sample(RECEIVED_TOKENS, self.num_received_tokens)
        yield Sample(QUEUE, self.queue)
        yield Sample(COMPUTE, self.compute)
