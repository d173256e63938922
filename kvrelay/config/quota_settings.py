"""Settings of what one key may take by default, and of waiting for a place."""

from pydantic import Field

from kvrelay.config.base import Settings


class QuotaSettings(Settings):
    key_running_requests: int | None = Field(
        default=None,
        ge=1,
        description="Most requests in progress of one key. Default: half of --max-running-requests.",
    )
    key_queued_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens of one key's requests that wait for their first token. "
        "Default: half of --max-queued-prompt-tokens.",
    )
    key_output_tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Output tokens that one key may get in a minute. Over it new requests are refused, and running "
        "ones go on. Default: no limit.",
    )
    key_formats_per_minute: int = Field(
        default=60, ge=1, description="Response formats that one key may have compiled in a minute."
    )
    key_stored_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=1,
        description="Most bytes in Redis of one key's requests, as gateways count what they wrote.",
    )
    key_unattended_requests: int = Field(
        default=8, ge=0, description="Resumable requests of one key that may run on without any client."
    )
    local_unattended_requests: int | None = Field(
        default=None,
        ge=0,
        description="The same for all callers without credentials. Default: a quarter of --max-running-requests.",
    )
    max_waiting_requests: int = Field(
        default=256,
        ge=0,
        description="Most requests of callers with credentials that wait for a place while the gateway is full. "
        "Over it the tenant with the most loses its last.",
    )
    place_wait_ms: int = Field(default=2000, ge=0, description="How long such a request waits at most.")
