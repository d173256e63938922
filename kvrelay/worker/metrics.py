"""The metrics of every worker: load, sessions and jobs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvrelay.observability.metrics import vllm_names
from kvrelay.observability.metrics.families import Family, Sample
from kvrelay.worker.gateway_sessions import GatewaySessions

RUNNING = Family("kvrelay_worker_sequences_running", "gauge", "Sequences in the running batch.")
WAITING = Family("kvrelay_worker_works_waiting", "gauge", "Jobs that were accepted and do not run yet.")
QUEUED_TOKENS = Family("kvrelay_worker_queued_prompt_tokens", "gauge", "Prompt tokens that are still to be computed.")
BLOCKS = Family("kvrelay_worker_kv_blocks", "gauge", "KV blocks; state: free, cached (reusable) or used.", ("state",))
BLOCK_TOKENS = Family("kvrelay_worker_kv_block_tokens", "gauge", "Tokens that a KV block holds.")
PREFIX_HITS = Family("kvrelay_worker_prefix_hit_tokens_total", "counter", "Tokens that were found in the prefix cache.")
PROMPT_TOKENS = Family("kvrelay_worker_prompt_tokens_total", "counter", "Prompt tokens that were computed.")
PREEMPTIONS = Family("kvrelay_worker_preemptions_total", "counter", "Sequences that were preempted for want of blocks.")
DRAFTED = Family("kvrelay_worker_drafted_tokens_total", "counter", "Tokens that were guessed by speculation.")
ACCEPTED = Family("kvrelay_worker_accepted_tokens_total", "counter", "Guessed tokens that were right.")
SESSIONS = Family("kvrelay_worker_sessions", "gauge", "Sessions with gateways.")
LOSSES = Family("kvrelay_worker_session_losses_total", "counter", "Sessions whose gateway fell silent or did not read.")
JOBS = Family(
    "kvrelay_worker_works_total", "counter", "Jobs that were taken on: attempts at requests, or parts of them."
)
FAILURES = Family(
    "kvrelay_worker_work_failures_total", "counter", "Jobs that failed or were refused, by kind.", ("kind",)
)
BUSY = Family(
    "kvrelay_worker_engine_busy_seconds_total", "counter", "Time in which the engine thread had something to do."
)
RATE = Family(
    "kvrelay_worker_prompt_tokens_per_second",
    "gauge",
    "How fast the last steps computed prompts: alone, or shared with decoding sequences; 0 until measured.",
    ("steps",),
)
CHUNK = Family(
    "kvrelay_worker_prompt_chunk_tokens",
    "gauge",
    "Most prompt tokens of the next step: alone, or shared with decoding sequences.",
    ("steps",),
)

FAMILIES = (
    RUNNING,
    WAITING,
    QUEUED_TOKENS,
    BLOCKS,
    BLOCK_TOKENS,
    PREFIX_HITS,
    PROMPT_TOKENS,
    PREEMPTIONS,
    DRAFTED,
    ACCEPTED,
    SESSIONS,
    LOSSES,
    JOBS,
    FAILURES,
    BUSY,
    RATE,
    CHUNK,
)


@dataclass(frozen=True, slots=True)
class WorkerMetrics:
    """`own` gives samples of this kind of worker only."""

    model: str
    block_size: int
    sessions: GatewaySessions
    busy_s: Callable[[], float]
    own: Callable[[], Iterable[Sample]]

    def samples(self) -> Iterator[Sample]:
        load = self.sessions.load
        yield Sample(RUNNING, load.num_running)
        yield Sample(WAITING, load.num_waiting)
        yield Sample(QUEUED_TOKENS, load.num_queued_prompt_tokens)
        yield Sample(BLOCKS, load.num_free_blocks, ("free",))
        yield Sample(BLOCKS, load.num_cached_blocks, ("cached",))
        yield Sample(BLOCKS, load.num_used_blocks, ("used",))
        yield Sample(BLOCK_TOKENS, self.block_size)
        yield Sample(PREFIX_HITS, load.num_prefix_hit_tokens)
        yield Sample(PROMPT_TOKENS, load.num_computed_prompt_tokens)
        yield Sample(PREEMPTIONS, load.num_preemptions)
        yield Sample(DRAFTED, load.num_drafted_tokens)
        yield Sample(ACCEPTED, load.num_accepted_tokens)
        yield Sample(SESSIONS, self.sessions.num_sessions)
        yield Sample(LOSSES, self.sessions.num_lost)
        yield Sample(JOBS, self.sessions.num_jobs)
        yield from (Sample(FAILURES, number, (kind.value,)) for kind, number in self.sessions.failures.items())
        yield Sample(BUSY, self.busy_s())
        yield Sample(RATE, load.prefill_tokens_per_s, ("alone",))
        yield Sample(RATE, load.shared_prefill_tokens_per_s, ("shared",))
        yield Sample(CHUNK, load.prefill_chunk_tokens, ("alone",))
        yield Sample(CHUNK, load.shared_prefill_chunk_tokens, ("shared",))
        yield from self.own()

    def vllm_samples(self) -> Iterator[Sample]:
        load = self.sessions.load
        label = vllm_names.labels(self.model)
        usage = load.num_used_blocks / load.num_blocks if load.num_blocks else 0.0
        yield from vllm_names.gauges(self.model, load.num_running, load.num_waiting, usage)
        yield Sample(vllm_names.CACHE_CONFIG, 1, (*label, str(self.block_size), str(load.num_blocks)))
        yield Sample(vllm_names.PREEMPTIONS, load.num_preemptions, label)
        num_hits = load.num_prefix_hit_tokens
        yield Sample(vllm_names.PREFIX_QUERIES, num_hits + load.num_computed_prompt_tokens, label)
        yield Sample(vllm_names.PREFIX_HITS, num_hits, label)
