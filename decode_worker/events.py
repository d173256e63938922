"""What the scheduler and the engine loop of a decode worker report, as plain values."""

from dataclasses import dataclass

from kvrelay.chunk_times import ChunkTime
from kvrelay.work import FailureKind, SequenceToken, Work, WorkerLoad, WorkId


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """Scheduler: the prompt's blocks are set aside; those of the first `num_cached_tokens` tokens hold their KV already."""

    work: Work
    block_ids: tuple[int, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class ReservationOpened:
    """Engine loop: the same, with the ticket to write into them."""

    work_id: WorkId
    ticket: bytes
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class SequencesStarted:
    """The work's sequences run. Sizes and times are filled in by the engine loop."""

    work_id: WorkId
    kv_bytes: int = 0
    num_transferred_tokens: int = 0
    prefill_ms: float = 0.0
    queue_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """The work ended without its result; nothing of it is held any more."""

    work_id: WorkId
    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """The work ended, by its own rules or because it was given up; nothing of it is held any more."""

    work_id: WorkId


SchedulerEvent = BlocksReserved | SequencesStarted | WorkFailed | WorkEnded
Event = ReservationOpened | SequencesStarted | WorkFailed | WorkEnded


@dataclass(frozen=True, slots=True)
class StepReport:
    """All that one turn of the engine loop has to say, in order: events, then tokens. WorkEnded counts after the tokens."""

    events: tuple[Event, ...]
    tokens: tuple[SequenceToken, ...]
    load: WorkerLoad
