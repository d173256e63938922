"""Settings of a decode worker's steps."""

from pydantic import Field

from kvrelay.config.base import Settings


class DecodingSettings(Settings):
    local_prefill_chunk_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens in a step that also decodes. Default: what keeps such a step within 25 ms, or "
        "one and a half times a step without them, at least 16; where kernels do not compute the whole model, 16 on cpu, "
        "prefill-chunk-tokens on cuda.",
    )
    speculative_tokens: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Most draft tokens per sequence and step, by prompt lookup; 0 turns speculation off.",
    )
    speculative_max_rows: int = Field(
        default=16,
        ge=2,
        description="Draft tokens are added only until the step has this many tokens, over all sequences.",
    )
