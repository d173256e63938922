"""Jobs, which gateways give to workers, and what comes back. Pure values.

A request of n sequences starts as one job. In a later attempt, each unfinished sequence is a job of
its own: its prompt is the client's plus the tokens already emitted.
"""

from dataclasses import dataclass
from enum import Enum

from kvrelay.core.sampling_params import SamplingParams
from kvrelay.core.trace_context import TraceContext, log_fields

MAX_SHARE_WEIGHT = 1000


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


class FailureKind(Enum):
    OUT_OF_CAPACITY = "out_of_capacity"
    TRANSFER = "transfer"
    DRAINING = "draining"
    INVALID = "invalid"
    DEADLINE = "deadline"
    INTERNAL = "internal"
    SUPERSEDED = "superseded"
    """The worker saw this attempt, or a newer one, before, or the request is another gateway's."""
    UNPROVEN = "unproven"
    """Another gateway had the request, and Redis does not say whose it is."""


@dataclass(frozen=True, slots=True)
class JobId:
    request_id: str
    attempt: int
    first_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, and how to continue it.

        token_ids   |<------- client's prompt ------->|<-- emitted by earlier attempts -->|
                    0                          num_prompt_tokens                    len(token_ids)

    `first_index` is the output index of the next token.
    """

    job_id: JobId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_sequences: int
    sampling: SamplingParams
    cache_salt: str
    deadline_ms: int
    """Time left when the job was sent."""
    isolated: bool = False
    """A worker may have crashed on it: it runs alone until its second tokens."""
    trace: TraceContext | None = None
    share_weight: int = 1
    holder: int = 0
    """Tells the worker's sessions apart; the worker sets it."""

    @property
    def share(self) -> str:
        """Jobs of one share take turns with those of others, by weight."""
        return self.cache_salt

    @property
    def first_index(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def log_fields(self) -> dict[str, str | int]:
        return log_fields(self.job_id.request_id, self.job_id.attempt, self.trace)

    @property
    def sequences(self) -> range:
        return range(self.job_id.first_sequence, self.job_id.first_sequence + self.num_sequences)


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceToken:
    job_id: JobId
    sequence: int
    index: int
    token: Token
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    num_running: int = 0
    num_waiting: int = 0
    num_queued_prompt_tokens: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0
    draining: bool = False
    kv_transfer_bytes: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_computed_prompt_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    """0, as in the next two: not measured."""
    prefill_step_ms: float = 0.0
    shared_prefill_tokens_per_s: float = 0.0
    prefill_chunk_tokens: int = 0
    shared_prefill_chunk_tokens: int = 0


HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """By hashes of prefixes. No hash is in both."""

    published: tuple[bytes, ...] = ()
    evicted: tuple[bytes, ...] = ()
    forgets_all: bool = False
    """Nothing told before holds."""

    def __bool__(self) -> bool:
        return bool(self.published or self.evicted or self.forgets_all)


NO_CHANGES = CacheChanges()
