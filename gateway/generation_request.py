"""A request that was validated and tokenized: all that running it needs."""

from dataclasses import dataclass

from kvrelay.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asked for, resolved. Times are monotonic seconds."""

    request_id: str
    model: str
    fingerprint: str
    """Of the model that the prompt was tokenized for; only workers with it are used."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    """With seed and max_tokens."""
    tenant: str
    submit_time: float
    deadline: float
    resumable: bool = False
    preferred_decode_worker_id: str | None = None
    """Where the beginning of the prompt is probably cached."""

    @property
    def cache_salt(self) -> str:
        """Prefix caches are shared within a tenant."""
        return self.tenant
