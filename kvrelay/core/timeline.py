"""What happened to a request and when; clients draw it. Pure.

    request    |----------------------------------------------------------------|
    attempt 1  |route|reserve|queue|==prefill==|                                   '|' tokens
                                    [kv][kv][kv] transfer
                                               |decode | | | | |  x lost
    attempt 2                                                  |route|...|decode | | | |

Times are milliseconds since the request reached its gateway. The protos describe the fields.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import pairwise

from kvrelay.core.chunk_times import ChunkTime


@dataclass(frozen=True, slots=True)
class Phases:
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    exposed_transfer_ms: float = 0.0
    transfer_wire_ms: float = 0.0
    transfer_bytes: int = 0
    handoff_gap_ms: float = 0.0
    decode_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    total_ms: float = 0.0
    num_attempts: int = 0
    prefilled_on_decode_worker: bool = False
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    transfer_transport: str = ""


class SpanKind(Enum):
    ROUTE = "route"
    RESERVE = "reserve"
    PROMPT_QUEUE = "prompt_queue"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"


class JobOutcome(Enum):
    RUNNING = "running"
    COMPLETED = "completed"
    RETRIED = "retried"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class TimelineSpan:
    """`unreported`: it goes on, or its worker never reported the end."""

    kind: SpanKind
    begin_ms: float
    end_ms: float
    worker_id: str = ""
    unreported: bool = False


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Indices [first_index, end_index) of one sequence, from one job."""

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
class JobTimeline:
    attempt: int
    first_sequence: int
    num_sequences: int
    begin_ms: float
    end_ms: float
    outcome: JobOutcome
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
        return next((span for span in self.spans if span.kind is kind), None)


@dataclass(frozen=True, slots=True)
class Timeline:
    gateway_id: str
    start_time: datetime
    duration_ms: float
    ended: bool
    num_tokens_before: tuple[int, ...] = ()
    jobs: tuple[JobTimeline, ...] = ()
    num_forgotten_jobs: int = 0
    phases: Phases | None = None

    @property
    def num_attempts(self) -> int:
        return len({job.attempt for job in self.jobs})

    @property
    def sequences(self) -> list[int]:
        return sorted({run.sequence for job in self.jobs for run in job.token_runs})

    def token_runs(self, sequence: int) -> list[TokenRun]:
        runs = [run for job in self.jobs for run in job.token_runs if run.sequence == sequence]
        return sorted(runs, key=lambda run: run.first_index)

    def is_contiguous(self, sequence: int) -> bool:
        runs = self.token_runs(sequence)
        first = self.num_tokens_before[sequence] if self.num_tokens_before else 0
        return (
            bool(runs) and runs[0].first_index == first and all(a.end_index == b.first_index for a, b in pairwise(runs))
        )

    def pauses(self, sequence: int) -> list[tuple[float, float]]:
        """Begin and end of each recovery: from a job's last token to the next job's first."""
        return [(before.last_ms, after.first_ms) for before, after in pairwise(self.token_runs(sequence))]
