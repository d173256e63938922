"""What Redis knows of a request, as plain values, and how they are written into a Redis hash. Knows no connection and no clock."""

import dataclasses
import json
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay.request_state import RequestState
from kvrelay.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """A request without what only a takeover needs."""

    request_id: str
    state: RequestState
    attempt: int
    """From 1."""
    tenant: str
    model: str
    gateway_id: str
    """Instance id of the gateway that owns it."""
    num_prompt_tokens: int
    create_time_ms: int
    """Wall clock of the admitting gateway, milliseconds since the epoch."""
    update_time_ms: int
    """When the state last changed; Redis's clock."""
    deadline_time_ms: int
    """Wall clock, for people only; programs use `remaining_ms`."""
    remaining_ms: int
    """What was left of the deadline when the record was written or read, by Redis's clock; 0 when it has passed."""
    num_output_tokens: int = 0
    """Tokens emitted so far, over all sequences."""
    prefill_worker_id: str = ""
    """Empty when there is none."""
    decode_worker_id: str = ""
    error_message: str = ""
    """One sentence, when it failed."""
    error_reason: str = ""
    """`KvrelayError.reason` of that error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord(RequestSummary):
    """Enough to take the request over: with the log's frames it continues on any gateway."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    """Resolved: with seed, max_tokens and stop strings."""
    cache_salt: str = ""
    resumable: bool = False


CHANGEABLE_FIELDS = frozenset({"num_output_tokens", "prefill_worker_id", "decode_worker_id", "error_message", "error_reason"})
"""What may change along with a state."""
