"""The unit of work that a gateway gives to workers, as plain values: no wire, no tensors, no clock.

A request of n sequences starts as one work. When an attempt fails, every unfinished sequence becomes a work of its own in the
next attempt, because its prompt is the client's prompt plus the tokens already emitted, and those differ between sequences.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvrelay.sampling_params import SamplingParams
from kvrelay.trace_context import TraceContext, log_fields

if TYPE_CHECKING:
    from kvrelay.grammar import CompiledGrammar  # it compiles in threads


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


class FailureKind(Enum):
    """Why a worker could not do its work."""

    OUT_OF_CAPACITY = "out_of_capacity"
    TRANSFER = "transfer"
    DRAINING = "draining"
    INVALID = "invalid"
    DEADLINE = "deadline"
    INTERNAL = "internal"
    SUPERSEDED = "superseded"
    """This attempt or a newer one was here before: a higher one is wanted."""


@dataclass(frozen=True, slots=True)
class WorkId:
    """Names one work: a request's attempt, and the first of the sequences that the work continues."""

    request_id: str
    attempt: int
    first_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker needs to know to compute a prompt and to continue it.

        token_ids   |<------- client's prompt ------->|<-- emitted by earlier attempts -->|
                    0                          num_prompt_tokens                      len(token_ids)

    The next token to be sampled has output index `len(token_ids) - num_prompt_tokens`.
    """

    work_id: WorkId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_sequences: int
    sampling: SamplingParams
    cache_salt: str
    deadline_ms: int
    """What was left of the deadline when the work was sent."""
    runs_alone: bool = False
    """A worker may have died of it: a decode worker computes nothing else from its reservation until its second tokens."""
    trace: TraceContext | None = None
    """Of the attempt; None where nothing is traced."""
    grammar: "CompiledGrammar | None" = None
    """What `sampling.response_format` says, over the model's tokens. Set by the worker that runs the work; never on the wire."""

    @property
    def first_index(self) -> int:
        """Output index of the first token that this work samples."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def log_fields(self) -> dict[str, str | int]:
        """What a line of the log about it has."""
        return log_fields(self.work_id.request_id, self.work_id.attempt, self.trace)

    @property
    def sequences(self) -> range:
        """Numbers of the sequences within the request."""
        return range(self.work_id.first_sequence, self.work_id.first_sequence + self.num_sequences)


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """An alternative at one position; its natural log probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `logprob` is None unless log probabilities were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceToken:
    """One sequence's token of one engine step; `finish_reason` is set with its last one."""

    work_id: WorkId
    sequence: int
    index: int
    token: Token
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker is busy with; see the proto of the same name for each field."""

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
