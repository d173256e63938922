"""What the scheduler and the engine loop of a prefill worker report, as plain values."""

from dataclasses import dataclass

from kvrelay.chunk_times import ChunkTime
from kvrelay.work import FailureKind, SequenceToken, Work, WorkerLoad, WorkId


@dataclass(frozen=True, slots=True)
class PromptStarted:
    """The prompt has its blocks, with KV of the first `num_cached_tokens` tokens. `sends_kv`: a push is to be opened."""

    work: Work
    block_ids: tuple[int, ...]
    num_cached_tokens: int
    sends_kv: bool


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """The first tokens are sampled. `sends_kv`: the push goes on; else no KV is needed. The engine loop adds the times."""

    work_id: WorkId
    tokens: tuple[SequenceToken, ...]
    num_cached_tokens: int
    sends_kv: bool
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class SendingStopped:
    """The push is to be broken off; its blocks are freed when its sender has ended."""

    work_id: WorkId


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """The work ended without its result; nothing of it is held any more."""

    work_id: WorkId
    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """The work ended; nothing of it is held any more."""

    work_id: WorkId


Event = PromptStarted | PromptComputed | SendingStopped | WorkFailed | WorkEnded


@dataclass(frozen=True, slots=True)
class Report:
    """All that one turn of the engine loop has to say, in order."""

    events: tuple[Event, ...]
    load: WorkerLoad


@dataclass(frozen=True, slots=True)
class WrittenTokens:
    """Tokens of a work that a step computes."""

    work_id: WorkId
    token_begin: int
    token_end: int
