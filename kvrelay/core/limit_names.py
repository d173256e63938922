"""Names of the limits of a key, in refusals and metrics. Pure values."""

from enum import StrEnum


class LimitName(StrEnum):
    RUNNING_REQUESTS = "running_requests"
    QUEUED_PROMPT_TOKENS = "queued_prompt_tokens"
    OUTPUT_TOKENS = "output_tokens_per_minute"
    FORMATS = "formats_per_minute"
    STORED_BYTES = "stored_bytes"
    UNATTENDED_REQUESTS = "unattended_requests"
