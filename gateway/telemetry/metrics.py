"""Counts a gateway's requests, tokens, times, attempts and sessions, by model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from gateway.lifecycle import events
from kvrelay.core.job import FailureKind, FinishReason
from kvrelay.core.limit_names import LimitName
from kvrelay.core.request_state import RequestState
from kvrelay.core.timeline import Phases
from kvrelay.errors import (
    InternalError,
    InvalidRequestError,
    KvrelayError,
    OverloadedError,
    QuotaError,
    StoreFullError,
    UnavailableError,
)
from kvrelay.observability.metrics.families import SIZE_BOUNDS, Family, Histogram, Sample

OUTCOMES = ("succeeded", "failed", "cancelled", "expired", "left")
REFUSALS_RAISED = (OverloadedError, QuotaError, StoreFullError, UnavailableError)
REFUSAL_REASONS = tuple(kind.reason for kind in REFUSALS_RAISED)
FAILURE_REASONS = tuple(
    kind.reason for kind in (InternalError, InvalidRequestError, OverloadedError, QuotaError, UnavailableError)
)
PHASES = ("queue", "prefill", "transfer", "exposed_transfer", "handoff_gap", "decode")

REQUESTS_STARTED = Family("kvrelay_requests_started_total", "counter", "Requests that were admitted.", ("model",))
REQUESTS = Family(
    "kvrelay_requests_total",
    "counter",
    "Requests that ended here; outcome: succeeded, failed, cancelled, expired, or left to another gateway.",
    ("model", "outcome"),
)
FAILURES = Family(
    "kvrelay_request_failures_total", "counter", "Requests that failed, by their error's reason.", ("model", "reason")
)
REFUSALS = Family(
    "kvrelay_requests_refused_total",
    "counter",
    "Requests that were not admitted, by their error's reason.",
    ("reason",),
)
QUOTA_REFUSALS = Family(
    "kvrelay_quota_refusals_total",
    "counter",
    "Requests that were not admitted, or not kept without a client, by the limit of their key that was reached.",
    ("limit",),
)
WAITING_FOR_PLACE = Family(
    "kvrelay_requests_waiting_for_place", "gauge", "Requests that wait for a place while the gateway is full."
)
RUNNING = Family("kvrelay_requests_running", "gauge", "Requests in progress that have their first token.", ("model",))
WAITING = Family("kvrelay_requests_waiting", "gauge", "Requests in progress without a first token.", ("model",))
QUEUED_TOKENS = Family("kvrelay_queued_prompt_tokens", "gauge", "Prompt tokens of requests without a first token.")
PROMPT_TOKENS = Family("kvrelay_prompt_tokens_total", "counter", "Prompt tokens of admitted requests.", ("model",))
CACHED_TOKENS = Family(
    "kvrelay_prompt_cached_tokens_total",
    "counter",
    "Prompt tokens of succeeded requests whose KV a decode worker had in its prefix cache.",
    ("model",),
)
OUTPUT_TOKENS = Family("kvrelay_output_tokens_total", "counter", "Tokens given to clients.", ("model",))
SEQUENCES = Family(
    "kvrelay_sequences_finished_total",
    "counter",
    "Sequences of succeeded requests; reason: stop or length.",
    ("model", "reason"),
)
ATTEMPTS = Family(
    "kvrelay_attempts_total",
    "counter",
    "Attempts that began; cause: first, takeover, or why the attempt before failed.",
    ("model", "cause"),
)
FIRST_TOKEN = Family(
    "kvrelay_time_to_first_token_seconds", "histogram", "From a request's arrival to its first token.", ("model",)
)
INTER_TOKEN = Family(
    "kvrelay_inter_token_latency_seconds",
    "histogram",
    "Between two tokens of a sequence; the later of a step's have 0.",
    ("model",),
)
PER_TOKEN = Family(
    "kvrelay_time_per_output_token_seconds",
    "histogram",
    "From first to last token over tokens after the first, of a request.",
    ("model",),
)
DURATION = Family("kvrelay_request_duration_seconds", "histogram", "From a request's arrival to its end.", ("model",))
PHASE = Family(
    "kvrelay_request_phase_seconds",
    "histogram",
    "Phases of succeeded requests; phase: queue, prefill, transfer, exposed_transfer, handoff_gap or decode.",
    ("model", "phase"),
)
PROMPT_SIZE = Family("kvrelay_request_prompt_tokens", "histogram", "Prompt tokens of an admitted request.", ("model",))
OUTPUT_SIZE = Family(
    "kvrelay_request_output_tokens", "histogram", "Tokens of all sequences of a succeeded request.", ("model",)
)
ROUTED_TOKENS = Family(
    "kvrelay_routed_prompt_tokens_total",
    "counter",
    "Tokens of prompts whose worker said what it had cached; role: prefill or decode.",
    ("role",),
)
EXPECTED_TOKENS = Family(
    "kvrelay_routing_expected_cached_tokens_total",
    "counter",
    "Leading tokens of these prompts that the gateway expected in the worker's prefix cache.",
    ("role",),
)
FOUND_TOKENS = Family(
    "kvrelay_routing_found_cached_tokens_total",
    "counter",
    "Leading tokens of these prompts that were in the worker's prefix cache.",
    ("role",),
)
INDEX_ENTRIES = Family(
    "kvrelay_routing_index_entries",
    "gauge",
    "Pairs of a cached block and a worker that the gateway knows; 0 unless --routing is prefix.",
)
WORKERS = Family(
    "kvrelay_workers", "gauge", "Workers with which there is a session; role: prefill or decode.", ("role",)
)
LOSSES = Family(
    "kvrelay_session_losses_total",
    "counter",
    "Sessions with workers that ended; cause: broken, as when a process dies, or other: silence, or an orderly end.",
    ("role", "cause"),
)
PLACEMENTS = Family(
    "kvrelay_prompts_placed_total",
    "counter",
    "Prompts that had a choice of workers and were given to the one with the sooner first token, by its role.",
    ("role",),
)
FORMATS = Family(
    "kvrelay_response_formats_total",
    "counter",
    "Response formats that were checked; outcome: accepted, refused, or over a limit: time, memory, answer.",
    ("outcome",),
)
CHATS = Family(
    "kvrelay_chats_rendered_total",
    "counter",
    "Chats by what their model's template did; outcome: rendered, refused, broken, resting, or over a limit: time, "
    "memory, answer.",
    ("outcome",),
)
CONFINED_CHILDREN = Family(
    "kvrelay_confined_children_started_total",
    "counter",
    "Processes with limits that were started, at first or in place of one over its limit; work: format or chat.",
    ("work",),
)
LOOP_DELAY = Family(
    "kvrelay_event_loop_delay_seconds",
    "histogram",
    "How late the gateway's event loop was, looked at every 20 ms; time that other processes had the cores is left out.",
)
STORE_HEALTHY = Family("kvrelay_state_store_healthy", "gauge", "1 while Redis answers.")

FAMILIES = tuple(value for value in list(vars().values()) if isinstance(value, Family))


def attempt_cause(event: events.Event | None) -> str:
    """The event that ended the attempt before."""
    match event:
        case events.JobFailed(kind=kind):
            return str(kind.value)
        case events.WorkerLost():
            return "worker_lost"
        case events.TimerFired():  # the KV transfer was not completed
            return "transfer"
    return "internal"


def _sizes() -> Histogram:
    return Histogram(SIZE_BOUNDS)


def _value(member: Enum) -> str:
    return str(member.value)


def _zeros(*names: str) -> Counter[str]:
    """Starts at zero, so that a rate sees the first of each."""
    return Counter(dict.fromkeys(names, 0))


@dataclass(slots=True)
class ModelMetrics:
    num_started: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=lambda: _zeros(*OUTCOMES))
    failures: Counter[str] = field(default_factory=lambda: _zeros(*FAILURE_REASONS))
    attempts: Counter[str] = field(
        default_factory=lambda: _zeros("first", "takeover", "worker_lost", *map(_value, FailureKind))
    )
    finish_reasons: Counter[str] = field(default_factory=lambda: _zeros(*map(_value, FinishReason)))
    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    per_token: Histogram = field(default_factory=Histogram)
    duration: Histogram = field(default_factory=Histogram)
    prompt_size: Histogram = field(default_factory=_sizes)
    output_size: Histogram = field(default_factory=_sizes)
    phases: dict[str, Histogram] = field(default_factory=lambda: {phase: Histogram() for phase in PHASES})

    def record_admitted(self, num_prompt_tokens: int) -> None:
        self.num_started += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.prompt_size.observe(num_prompt_tokens)
        self.attempts["first"] += 1

    def record_taken_over(self) -> None:
        self.attempts["takeover"] += 1

    def record_token(self, gap_s: float | None) -> None:
        """`gap_s`: time since the sequence's token before."""
        self.num_output_tokens += 1
        if gap_s is not None:
            self.inter_token.observe(gap_s)

    def record_success(
        self, phases: Phases, reasons: list[FinishReason], num_cached_tokens: int, num_output_tokens: int
    ) -> None:
        self.num_cached_tokens += num_cached_tokens
        self.output_size.observe(num_output_tokens)
        for reason in reasons:
            self.finish_reasons[reason.value] += 1
        for phase, histogram in self.phases.items():
            # No sample of 0 for a local prefill, which has no transfer.
            if (duration_ms := getattr(phases, f"{phase}_ms")) > 0 or phase == "queue":
                histogram.observe(duration_ms / 1000)
        num_later_tokens = num_output_tokens - len(reasons)
        if num_later_tokens > 0:
            self.per_token.observe(phases.decode_ms / 1000 * len(reasons) / num_later_tokens)

    def record_end(self, state: RequestState, error: KvrelayError | None, duration_s: float, *, released: bool) -> None:
        """`released`: the request goes on at another gateway."""
        self.outcomes["left" if released else state.value.lower()] += 1
        self.duration.observe(duration_s)
        if error is not None and state is RequestState.FAILED and not released:
            self.failures[error.reason] += 1


class GatewayMetrics:
    def __init__(self) -> None:
        self.models: dict[str, ModelMetrics] = {}
        self.refusals = _zeros(*REFUSAL_REASONS)
        self.quota_refusals = _zeros(*LimitName)
        self.loop_delay = Histogram()

    def of_model(self, model: str) -> ModelMetrics:
        return self.models.setdefault(model, ModelMetrics())

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Ignores clients' mistakes."""
        try:
            yield
        except REFUSALS_RAISED as error:
            self.refusals[error.reason] += 1
            if isinstance(error, QuotaError):
                self.quota_refusals[error.limit] += 1
            raise

    def samples(self) -> Iterator[Sample]:
        """All but the gauges."""
        for name, model in self.models.items():
            yield from _model_samples(name, model)
        yield from (Sample(REFUSALS, number, (reason,)) for reason, number in self.refusals.items())
        yield from (Sample(QUOTA_REFUSALS, number, (limit,)) for limit, number in self.quota_refusals.items())
        yield Sample(LOOP_DELAY, self.loop_delay)


def _model_samples(name: str, model: ModelMetrics) -> Iterator[Sample]:
    of_model = (name,)
    yield Sample(REQUESTS_STARTED, model.num_started, of_model)
    yield Sample(PROMPT_TOKENS, model.num_prompt_tokens, of_model)
    yield Sample(CACHED_TOKENS, model.num_cached_tokens, of_model)
    yield Sample(OUTPUT_TOKENS, model.num_output_tokens, of_model)
    for family, counts in (
        (REQUESTS, model.outcomes),
        (FAILURES, model.failures),
        (ATTEMPTS, model.attempts),
        (SEQUENCES, model.finish_reasons),
    ):
        yield from (Sample(family, number, (name, value)) for value, number in counts.items())
    yield Sample(FIRST_TOKEN, model.first_token, of_model)
    yield Sample(INTER_TOKEN, model.inter_token, of_model)
    yield Sample(PER_TOKEN, model.per_token, of_model)
    yield Sample(DURATION, model.duration, of_model)
    yield Sample(PROMPT_SIZE, model.prompt_size, of_model)
    yield Sample(OUTPUT_SIZE, model.output_size, of_model)
    yield from (Sample(PHASE, histogram, (name, phase)) for phase, histogram in model.phases.items())
