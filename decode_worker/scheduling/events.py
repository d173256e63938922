"""Events of the decode worker's scheduler and engine loop."""

from dataclasses import dataclass

from kvrelay.core.chunk_times import ChunkTime
from kvrelay.core.job import NO_CHANGES, CacheChanges, Job, JobId, SequenceToken, WorkerLoad
from kvrelay.worker.commands import JobEnded, JobFailed


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """The first `num_cached_tokens` tokens of the prompt have KV in these blocks."""

    job: Job
    block_ids: tuple[int, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class ReservationOpened:
    """BlocksReserved with a ticket, from the engine loop."""

    job_id: JobId
    ticket: bytes
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class SequencesStarted:
    job_id: JobId
    kv_bytes: int = 0
    num_transferred_tokens: int = 0
    prefill_ms: float = 0.0
    queue_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()


SchedulerEvent = BlocksReserved | SequencesStarted | JobFailed | JobEnded
Event = ReservationOpened | SequencesStarted | JobFailed | JobEnded


@dataclass(frozen=True, slots=True)
class StepReport:
    """Events come before tokens, but JobEnded after them."""

    events: tuple[Event, ...]
    tokens: tuple[SequenceToken, ...]
    load: WorkerLoad
    cache_changes: CacheChanges = NO_CHANGES
