"""Decides whether the prefill or the decode worker computes a prompt. Pure.

It predicts when the sequence can be decoded, with its KV in place:

    prefill worker   (queue + prompt) / rate + step + handoff
    decode worker    (queue + prompt) / rate + step

Until rates are measured, in prompt tokens of the prefill worker:

    prefill worker   queue + prompt + HANDOFF_TOKENS
    decode worker    (queue + prompt) x slowdown
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.routing.handoff_costs import HandoffCost
from kvrelay.core.job import JobId, WorkerLoad

HANDOFF_TOKENS = 128
"""Cost of moving the KV, in prompt tokens, until it is measured."""
SLOWDOWN = 2
"""How much slower a decode worker counts, until it is measured."""
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


def without_rates(load: WorkerLoad) -> WorkerLoad:
    return replace(load, prefill_tokens_per_s=0.0, prefill_step_ms=0.0, shared_prefill_tokens_per_s=0.0)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds until the sequence can be decoded, or a multiple of them while nothing is measured."""

    on_decode_worker: float
    on_prefill_worker: float

    @property
    def is_local(self) -> bool:
        return self.on_decode_worker < self.on_prefill_worker


def predict(
    num_uncached_tokens: int, decode: WorkerLoad, prefill: WorkerLoad, handoff: HandoffCost | None = None
) -> Prediction:
    """`num_uncached_tokens` have no KV on the decode worker.

    `decode` counts this prompt already, as its reservation; `prefill` does not.
    """
    prefill_rate = prefill.prefill_tokens_per_s or decode.prefill_tokens_per_s * SLOWDOWN or 1.0
    prefill_s = (_tokens_before(num_uncached_tokens, prefill) + num_uncached_tokens) / prefill_rate
    if handoff is None:
        handoff_s = HANDOFF_TOKENS / prefill_rate
    else:
        handoff_s = handoff.seconds(num_uncached_tokens, num_uncached_tokens / prefill_rate)
    num_queued = decode.num_queued_prompt_tokens + num_uncached_tokens
    decode_s = num_queued / _decode_rate(num_uncached_tokens, decode, prefill_rate)
    return Prediction(
        on_decode_worker=decode_s + decode.prefill_step_ms / 1000,
        on_prefill_worker=prefill_s + prefill.prefill_step_ms / 1000 + handoff_s,
    )


def _decode_rate(num_tokens: int, decode: WorkerLoad, prefill_rate: float) -> float:
    alone, shared = decode.prefill_tokens_per_s, decode.shared_prefill_tokens_per_s
    # this prompt's own blocks wait too
    has_others = decode.num_running > 0 or decode.num_waiting > 1
    if has_others and shared:
        return min(shared, alone or shared)
    alone = alone or prefill_rate / SLOWDOWN
    if not has_others:
        return alone
    return alone * SLOWDOWN / LONG_PROMPT_SLOWDOWN if num_tokens > SHORT_PROMPT_TOKENS else alone


def _tokens_before(num_tokens: int, load: WorkerLoad) -> int:
    """Short prompts overtake others on a prefill worker."""
    num_queued = load.num_queued_prompt_tokens
    # below the queue's average
    is_short = num_tokens * (load.num_running + load.num_waiting) < num_queued
    return min(num_queued, SHORT_PROMPT_TOKENS) if is_short else num_queued
