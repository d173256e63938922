"""What happened to a request and when, as values: what a gateway tells, and what is drawn of it. Pure: no clock, no wire.

    request    |----------------------------------------------------------------|
    attempt 1  |route|reserve|queue|==prefill==|                                   '|' tokens
                                    [kv][kv][kv] transfer
                                               |decode | | | | |  x lost
    attempt 2                                                  |route|...|decode | | | |

All times are milliseconds since the request came to the gateway that tells them. The protos of these names say what fields are.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import pairwise

from kvrelay.chunk_times import ChunkTime
from kvrelay.telemetry import Phases


class SpanKind(Enum):
    """A phase of a work."""

    ROUTE = "route"
    RESERVE = "reserve"
    PROMPT_QUEUE = "prompt_queue"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"


class WorkOutcome(Enum):
    """How a work came to its end."""

    RUNNING = "running"
    COMPLETED = "completed"
    RETRIED = "retried"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class TimelineSpan:
    """A phase of a work; `unreported` when it goes on, or its worker never told of its end."""

    kind: SpanKind
    begin_ms: float
    end_ms: float
    worker_id: str = ""
    unreported: bool = False


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens of one sequence that came of one work: indices [first_index, end_index)."""

    sequence: int
    first_index: int
    num_tokens: int
    first_ms: float
    last_ms: float
    mark_ms: tuple[float, ...] = ()
    mark_stride: int = 1

    @property
    def end_index(self) -> int:
        return self.first_index + self.num_tokens


@dataclass(frozen=True, slots=True)
class WorkTimeline:
    """One attempt at a request's sequences, or at one of them."""

    attempt: int
    first_sequence: int
    num_sequences: int
    begin_ms: float
    end_ms: float
    outcome: WorkOutcome
    end_reason: str = ""
    failed_worker_id: str = ""
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    prefilled_on_decode_worker: bool = False
    spans: tuple[TimelineSpan, ...] = ()
    prompt_chunks: tuple[ChunkTime, ...] = ()
    kv_chunks: tuple[ChunkTime, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    kv_bytes: int = 0
    exposed_transfer_ms: float = 0.0
    transfer_wire_ms: float = 0.0
    transfer_transport: str = ""
    token_runs: tuple[TokenRun, ...] = ()

    def span(self, kind: SpanKind) -> TimelineSpan | None:
        """The phase, if it happened."""
        return next((span for span in self.spans if span.kind is kind), None)


@dataclass(frozen=True, slots=True)
class Timeline:
    """One request's, as one gateway saw it."""

    gateway_id: str
    start_time: datetime
    duration_ms: float
    ended: bool
    num_tokens_before: tuple[int, ...] = ()
    works: tuple[WorkTimeline, ...] = ()
    num_forgotten_works: int = 0
    phases: Phases | None = None

    @property
    def num_attempts(self) -> int:
        """Attempts of which something is told."""
        return len({work.attempt for work in self.works})

    @property
    def sequences(self) -> list[int]:
        """Numbers of the sequences that have tokens."""
        return sorted({run.sequence for work in self.works for run in work.token_runs})

    def token_runs(self, sequence: int) -> list[TokenRun]:
        """The sequence's tokens over all attempts, in the order of their indices."""
        runs = [run for work in self.works for run in work.token_runs if run.sequence == sequence]
        return sorted(runs, key=lambda run: run.first_index)

    def is_contiguous(self, sequence: int) -> bool:
        """Whether each token index of the sequence came once and in order, over all attempts."""
        runs = self.token_runs(sequence)
        first = self.num_tokens_before[sequence] if self.num_tokens_before else 0
        return bool(runs) and runs[0].first_index == first and all(a.end_index == b.first_index for a, b in pairwise(runs))

    def pauses(self, sequence: int) -> list[tuple[float, float]]:
        """(begin, end) between the last token of one work and the first of the next: what a client noticed of a recovery."""
        return [(before.last_ms, after.first_ms) for before, after in pairwise(self.token_runs(sequence))]
