"""A validated, tokenized request. Pure."""

from dataclasses import dataclass

from kvrelay.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Includes its progress if it was taken over. Times are monotonic seconds."""

    request_id: str
    model: str
    fingerprint: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    """Its seed and max_tokens are set."""
    tenant: str
    submit_time: float
    deadline: float
    resumable: bool = False
    preferred_decode_worker_id: str | None = None
    """Probably caches the prompt's beginning."""
    attempt: int = 1
    """Number of this gateway's first attempt."""
    emitted: tuple[tuple[int, ...], ...] = ()
    """Token ids that the client has, by sequence."""
    finished_sequences: frozenset[int] = frozenset()
    session_key: str = ""
    """The client's, for requests that shall meet the same workers."""
    cache_salt: str = ""
    """Set when the request is started."""
    keeps_output: bool = False
    """Whether the store gets its content, for takeovers and later readers."""
    share_weight: int = 1
    """Of its tenant, on busy workers."""
