"""Events of the prefill worker's scheduler and engine loop."""

from dataclasses import dataclass

from kvrelay.core.chunk_times import ChunkTime
from kvrelay.core.job import NO_CHANGES, CacheChanges, Job, JobId, SequenceToken, WorkerLoad
from kvrelay.worker.commands import JobEnded, JobFailed


@dataclass(frozen=True, slots=True)
class PromptStarted:
    """The prompt has blocks. `sends_kv`: a push must start."""

    job: Job
    block_ids: tuple[int, ...]
    num_cached_tokens: int
    sends_kv: bool


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """The first tokens are sampled. `sends_kv`: the push continues."""

    job_id: JobId
    tokens: tuple[SequenceToken, ...]
    num_cached_tokens: int
    sends_kv: bool
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class SendingStopped:
    """The sender must stop. The job's blocks are freed after it."""

    job_id: JobId


Event = PromptStarted | PromptComputed | SendingStopped | JobFailed | JobEnded


@dataclass(frozen=True, slots=True)
class Report:
    events: tuple[Event, ...]
    load: WorkerLoad
    cache_changes: CacheChanges = NO_CHANGES


@dataclass(frozen=True, slots=True)
class WrittenTokens:
    job_id: JobId
    token_begin: int
    token_end: int
