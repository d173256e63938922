"""Metrics of prefill workers only."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvrelay.observability.metrics.families import RATE_BOUNDS, Family, Histogram, Sample
from prefill_worker.kv_sender import TransferResult
from prefill_worker.scheduling.events import PromptComputed

PROMPTS = Family("kvrelay_prefill_prompts_total", "counter", "Prompts that were computed to their end.")
QUEUE = Family("kvrelay_prefill_queue_seconds", "histogram", "From a prompt's arrival to its first step.")
COMPUTE = Family("kvrelay_prefill_compute_seconds", "histogram", "From a prompt's first step to its first token.")
FIRST_TOKENS = Family(
    "kvrelay_prefill_first_tokens_total", "counter", "First tokens that were sampled, one for each sequence."
)
SENDING = Family("kvrelay_transfers_running", "gauge", "Transfers of KV that are under way.")
FAILED = Family("kvrelay_transfer_failures_total", "counter", "Transfers that broke off.")
TRANSPORT = ("transport",)
TRANSFERS = Family(
    "kvrelay_transfers_total", "counter", "Complete transfers; transport: grpc or shared-memory.", TRANSPORT
)
BYTES = Family("kvrelay_transfer_bytes_total", "counter", "KV payload of complete transfers.", TRANSPORT)
DURATION = Family(
    "kvrelay_transfer_duration_seconds", "histogram", "From a transfer's first chunk to its end.", TRANSPORT
)
EXPOSED = Family(
    "kvrelay_transfer_exposed_seconds",
    "histogram",
    "The part of it after the first token: not hidden behind prefill.",
    TRANSPORT,
)
WIRE = Family(
    "kvrelay_transfer_wire_seconds_total",
    "counter",
    "Time in which a chunk was under way, over all transfers.",
    TRANSPORT,
)
RATE = Family(
    "kvrelay_transfer_throughput_bytes_per_second", "histogram", "A transfer's bytes over its wire time.", TRANSPORT
)
RESENT = Family(
    "kvrelay_transfer_resent_chunks_total", "counter", "Chunks that were refused and sent once more.", TRANSPORT
)

FAMILIES = (
    PROMPTS,
    QUEUE,
    COMPUTE,
    FIRST_TOKENS,
    SENDING,
    FAILED,
    TRANSFERS,
    BYTES,
    DURATION,
    EXPOSED,
    WIRE,
    RATE,
    RESENT,
)


@dataclass(slots=True)
class _TransportTotals:
    num_transfers: int = 0
    kv_bytes: int = 0
    wire_s: float = 0.0
    num_resent_chunks: int = 0
    duration: Histogram = field(default_factory=Histogram)
    exposed: Histogram = field(default_factory=Histogram)
    rate: Histogram = field(default_factory=lambda: Histogram(RATE_BOUNDS))


@dataclass(slots=True)
class PrefillMetrics:
    """Used on the event loop."""

    num_prompts: int = 0
    num_first_tokens: int = 0
    num_failed_transfers: int = 0
    queue: Histogram = field(default_factory=Histogram)
    compute: Histogram = field(default_factory=Histogram)
    _sent: dict[str, _TransportTotals] = field(default_factory=dict)

    def record_prompt(self, event: PromptComputed) -> None:
        self.num_prompts += 1
        self.num_first_tokens += len(event.tokens)
        self.queue.observe(event.queue_ms / 1000)
        self.compute.observe(event.prefill_ms / 1000)

    def record_transfer(self, result: TransferResult) -> None:
        sent = self._sent.setdefault(result.transport, _TransportTotals())
        wire_s = result.wire_ms / 1000
        sent.num_transfers += 1
        sent.kv_bytes += result.kv_bytes
        sent.wire_s += wire_s
        sent.num_resent_chunks += result.num_resent_chunks
        sent.duration.observe(result.transfer_ms / 1000)
        sent.exposed.observe(result.exposed_ms / 1000)
        if wire_s > 0:
            sent.rate.observe(result.kv_bytes / wire_s)

    def samples(self, num_senders: int) -> Iterator[Sample]:
        yield Sample(PROMPTS, self.num_prompts)
        yield Sample(QUEUE, self.queue)
        yield Sample(COMPUTE, self.compute)
        yield Sample(FIRST_TOKENS, self.num_first_tokens)
        yield Sample(SENDING, num_senders)
        yield Sample(FAILED, self.num_failed_transfers)
        for transport, sent in self._sent.items():
            yield Sample(TRANSFERS, sent.num_transfers, (transport,))
            yield Sample(BYTES, sent.kv_bytes, (transport,))
            yield Sample(DURATION, sent.duration, (transport,))
            yield Sample(EXPOSED, sent.exposed, (transport,))
            yield Sample(WIRE, sent.wire_s, (transport,))
            yield Sample(RATE, sent.rate, (transport,))
            yield Sample(RESENT, sent.num_resent_chunks, (transport,))
