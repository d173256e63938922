"""Decides whether the prefill or the decode worker computes a prompt. Pure.

It compares the prompt tokens computed before the first token comes:

    prefill worker   queue + prompt + handoff
    decode worker    (queue + prompt) x slowdown
"""

from collections.abc import Callable
from dataclasses import replace

from kvrelay.core.job import JobId, WorkerLoad

HANDOFF_TOKENS = 128
"""Cost of moving the KV, in prompt tokens."""
SLOWDOWN = 2
"""Prefilling on the decode worker delays its running sequences."""
LONG_PROMPT_SLOWDOWN = 8
"""For a long prompt among decoding sequences: a step takes few of its tokens."""
SHORT_PROMPT_TOKENS = 256
"""The longest short prompt. It waits for at most this much of the running step."""

PrefillLocally = Callable[[JobId, str, str, int], bool]
"""(job id, decode worker, prefill worker, uncached tokens) → whether to prefill locally."""


class InFlightPrompts:
    """Prompts sent to one worker, until their first token. Its load shows them late."""

    def __init__(self) -> None:
        self._prompts: dict[JobId, tuple[int, int]] = {}
        """(prompt tokens, tokens that the worker had computed by then), in order."""

    def add(self, job_id: JobId, num_tokens: int, load: WorkerLoad) -> None:
        self._prompts[job_id] = (num_tokens, load.num_computed_prompt_tokens)

    def remove(self, job_id: JobId) -> None:
        self._prompts.pop(job_id, None)

    def expected_load(self, load: WorkerLoad) -> WorkerLoad:
        """The load as if it counted these prompts."""
        if not self._prompts:
            return load
        num_computed_before = next(num_computed for _, num_computed in self._prompts.values())
        # Of the oldest of these prompts, and perhaps of other gateways' prompts.
        num_computed = max(0, load.num_computed_prompt_tokens - num_computed_before)
        num_queued = sum(num_tokens for num_tokens, _ in self._prompts.values()) - num_computed
        return replace(
            load,
            num_waiting=max(load.num_waiting, len(self._prompts) - load.num_running),
            num_queued_prompt_tokens=max(load.num_queued_prompt_tokens, num_queued),
        )


def should_prefill_locally(num_uncached_tokens: int, decode: WorkerLoad, prefill: WorkerLoad) -> bool:
    """`num_uncached_tokens` have no KV on the decode worker.

    `decode` counts this prompt already, as its reservation; `prefill` does not.
    """
    # this prompt's own blocks wait too
    has_others = decode.num_running > 0 or decode.num_waiting > 1
    slowdown = LONG_PROMPT_SLOWDOWN if has_others and num_uncached_tokens > SHORT_PROMPT_TOKENS else SLOWDOWN
    on_decode_worker = (decode.num_queued_prompt_tokens + num_uncached_tokens) * slowdown
    on_prefill_worker = _tokens_before(num_uncached_tokens, prefill) + num_uncached_tokens + HANDOFF_TOKENS
    return on_decode_worker < on_prefill_worker


def _tokens_before(num_tokens: int, load: WorkerLoad) -> int:
    """Short prompts overtake others on a prefill worker."""
    num_queued = load.num_queued_prompt_tokens
    # below the queue's average
    is_short = num_tokens * (load.num_running + load.num_waiting) < num_queued
    return min(num_queued, SHORT_PROMPT_TOKENS) if is_short else num_queued
