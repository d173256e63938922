"""What a gateway counts: requests, tokens, times, attempts, sessions. Written where things happen, read when somebody scrapes.

Per model, since that is what clients ask for. A request costs some tens of additions, a token two.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from gateway import lifecycle_messages as m
from kvrelay.errors import (
    InternalError,
    InvalidRequestError,
    KvrelayError,
    OverloadedError,
    StoreFullError,
    UnavailableError,
)
from kvrelay.metrics.families import SIZE_BOUNDS, Family, Histogram, Sample
from kvrelay.request_state import RequestState
from kvrelay.telemetry import Phases
from kvrelay.work import FailureKind, FinishReason

OUTCOMES = ("succeeded", "failed", "cancelled", "expired", "left")
REFUSALS_RAISED = (OverloadedError, StoreFullError, UnavailableError)
REFUSAL_REASONS = tuple(kind.reason for kind in REFUSALS_RAISED)
FAILURE_REASONS = tuple(kind.reason for kind in (InternalError, InvalidRequestError, OverloadedError, UnavailableError))
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
    "kvrelay_requests_refused_total", "counter", "Requests that were not admitted, by their error's reason.", ("reason",)
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
    "kvrelay_sequences_finished_total", "counter", "Sequences of succeeded requests; reason: stop or length.", ("model", "reason")
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
OUTPUT_SIZE = Family("kvrelay_request_output_tokens", "histogram", "Tokens of all sequences of a succeeded request.", ("model",))
WORKERS = Family("kvrelay_workers", "gauge", "Workers with which there is a session; role: prefill or decode.", ("role",))
LOSSES = Family(
    "kvrelay_session_losses_total",
    "counter",
    "Sessions with workers that ended; cause: broken, as when a process dies, or other: silence, or an orderly end.",
    ("role", "cause"),
)
STORE_HEALTHY = Family("kvrelay_state_store_healthy", "gauge", "1 while Redis answers.")

FAMILIES = (
    REQUESTS_STARTED,
    REQUESTS,
    FAILURES,
    REFUSALS,
    RUNNING,
    WAITING,
    QUEUED_TOKENS,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    OUTPUT_TOKENS,
    SEQUENCES,
    ATTEMPTS,
    FIRST_TOKEN,
    INTER_TOKEN,
    PER_TOKEN,
    DURATION,
    PHASE,
    PROMPT_SIZE,
    OUTPUT_SIZE,
    WORKERS,
    LOSSES,
    STORE_HEALTHY,
)


def attempt_cause(event: m.Event | None) -> str:
    """Why an attempt follows on another, by the event at which the lifecycle gave that up."""
    match event:
        case m.WorkFailed(kind=kind):
            return str(kind.value)
        case m.WorkerLost():
            return "worker_lost"
        case m.TimerFired():  # nothing came from a prefill worker that is gone
            return "transfer"
    return "internal"


def _sizes() -> Histogram:
    return Histogram(SIZE_BOUNDS)


def _value(member: Enum) -> str:
    return str(member.value)


def _zeros(*names: str) -> Counter[str]:
    """From the first scrape on, so that a rate sees the first of each."""
    return Counter(dict.fromkeys(names, 0))


@dataclass(slots=True)
class ModelMetrics:
    """What is counted of one model's requests."""

    num_started: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=lambda: _zeros(*OUTCOMES))
    failures: Counter[str] = field(default_factory=lambda: _zeros(*FAILURE_REASONS))
    attempts: Counter[str] = field(default_factory=lambda: _zeros("first", "takeover", "worker_lost", *map(_value, FailureKind)))
    finish_reasons: Counter[str] = field(default_factory=lambda: _zeros(*map(_value, FinishReason)))
    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    per_token: Histogram = field(default_factory=Histogram)
    duration: Histogram = field(default_factory=Histogram)
    prompt_size: Histogram = field(default_factory=_sizes)
    output_size: Histogram = field(default_factory=_sizes)
    phases: dict[str, Histogram] = field(default_factory=lambda: {phase: Histogram() for phase in PHASES})

    def note_admitted(self, num_prompt_tokens: int) -> None:
        """A request begins."""
        self.num_started += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.prompt_size.observe(num_prompt_tokens)
        self.attempts["first"] += 1

    def note_taken_over(self) -> None:
        """A request of a dead gateway goes on here."""
        self.attempts["takeover"] += 1

    def note_token(self, gap_s: float | None) -> None:
        """A token goes to the client, so long after the one before of its sequence."""
        self.num_output_tokens += 1
        if gap_s is not None:
            self.inter_token.observe(gap_s)

    def note_succeeded(self, phases: Phases, reasons: list[FinishReason], num_cached_tokens: int, num_output_tokens: int) -> None:
        """A request has all its tokens."""
        self.num_cached_tokens += num_cached_tokens
        self.output_size.observe(num_output_tokens)
        for reason in reasons:
            self.finish_reasons[reason.value] += 1
        for phase, histogram in self.phases.items():
            # What did not happen has no length: a prompt that was computed where it is continued was not transferred.
            if (duration_ms := getattr(phases, f"{phase}_ms")) > 0 or phase == "queue":
                histogram.observe(duration_ms / 1000)
        num_later_tokens = num_output_tokens - len(reasons)
        if num_later_tokens > 0:
            self.per_token.observe(phases.decode_ms / 1000 * len(reasons) / num_later_tokens)

    def note_ended(self, state: RequestState, error: KvrelayError | None, duration_s: float, *, released: bool) -> None:
        """A request has ended, or `released`: goes on elsewhere."""
        self.outcomes["left" if released else state.value.lower()] += 1
        self.duration.observe(duration_s)
        if error is not None and state is RequestState.FAILED and not released:
            self.failures[error.reason] += 1


class GatewayMetrics:
    """All that one gateway counts."""

    def __init__(self) -> None:
        self.models: dict[str, ModelMetrics] = {}
        self.refusals = _zeros(*REFUSAL_REASONS)

    def of_model(self, model: str) -> ModelMetrics:
        """Of the model that is served under that name."""
        return self.models.setdefault(model, ModelMetrics())

    @contextmanager
    def noting_refusals(self) -> Iterator[None]:
        """Around what refuses requests that are not at fault."""
        try:
            yield
        except REFUSALS_RAISED as error:
            self.refusals[error.reason] += 1
            raise

    def samples(self) -> Iterator[Sample]:
        """All but what only the relay knows."""
        for name, model in self.models.items():
            yield from _model_samples(name, model)
        yield from (Sample(REFUSALS, number, (reason,)) for reason, number in self.refusals.items())


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
