"""Where a prompt is computed: on the prefill worker, or on the decode worker that continues it. Pure.

Both ways are compared by when the first token would be there, counted in prompt tokens that are computed before:

    prefill worker   queue + prompt + handoff
    decode worker    (queue + prompt) x slowdown

The handoff stands for what it takes to get the KV and the sequence across. The slowdown stands for what a prompt costs on the
decode worker: an idle one lends its cores to the prefill worker, and takes them back for a prompt of its own; where sequences
decode, or will before a long prompt is done, a step takes a few tokens of it only, and slows the sequences down for long: that
counts for more than when its own first token comes. So short prompts stay, long ones leave, and a long queue on one side goes to
the other.
"""

from collections.abc import Callable
from dataclasses import replace

from kvrelay.work import WorkerLoad, WorkId

HANDOFF_TOKENS = 128
SLOWDOWN = 2
LONG_PROMPT_SLOWDOWN = 8
"""Of a long prompt among sequences that decode, or are about to."""
CHUNK_TOKENS = 256
"""For how much a prompt that overtakes the others waits: the step under way. Prompts up to it are short."""

PlacePrompt = Callable[[WorkId, str, str, int], bool]
"""From a work, its decode and prefill worker and its tokens without KV on the former: whether the prompt stays there."""


class SentPrompts:
    """Prompts that this gateway told one worker to compute and whose first token has not come.

    A worker's load says what waits there, but late: it does not count a prompt that is on the way, or that came during a step.
    """

    def __init__(self) -> None:
        self._prompts: dict[WorkId, tuple[int, int]] = {}
        """Tokens, and what the worker had computed in all when it was told, in order."""

    def add(self, work_id: WorkId, num_tokens: int, load: WorkerLoad) -> None:
        """The worker is told to compute a prompt; `load` is what it reported last."""
        self._prompts[work_id] = (num_tokens, load.num_computed_prompt_tokens)

    def remove(self, work_id: WorkId) -> None:
        """Its first token is there, or nobody wants it any more. Others are ignored."""
        self._prompts.pop(work_id, None)

    def expected_load(self, load: WorkerLoad) -> WorkerLoad:
        """The worker's load as it will be reported once all these prompts are counted."""
        if not self._prompts:
            return load
        num_computed_before = next(num_computed for _, num_computed in self._prompts.values())
        num_computed = max(0, load.num_computed_prompt_tokens - num_computed_before)  # of the oldest of them, and perhaps others
        num_queued = sum(num_tokens for num_tokens, _ in self._prompts.values()) - num_computed
        return replace(
            load,
            num_waiting=max(load.num_waiting, len(self._prompts) - load.num_running),
            num_queued_prompt_tokens=max(load.num_queued_prompt_tokens, num_queued),
        )


def is_sooner_on_decode_worker(num_uncached_tokens: int, decode: WorkerLoad, prefill: WorkerLoad) -> bool:
    """Whether the decode worker is to compute a prompt.

    Args:
        num_uncached_tokens: of the prompt, on the decode worker.
        decode: load of the decode worker that has reserved blocks for it.
        prefill: load of the prefill worker that would compute it otherwise, without this prompt.
    """
    has_others = decode.num_running > 0 or decode.num_waiting > 1  # this prompt's own blocks wait too
    slowdown = LONG_PROMPT_SLOWDOWN if has_others and num_uncached_tokens > CHUNK_TOKENS else SLOWDOWN
    on_decode_worker = (decode.num_queued_prompt_tokens + num_uncached_tokens) * slowdown
    on_prefill_worker = _tokens_before(num_uncached_tokens, prefill) + num_uncached_tokens + HANDOFF_TOKENS
    return on_decode_worker < on_prefill_worker


def _tokens_before(num_tokens: int, load: WorkerLoad) -> int:
    """Tokens that the prefill worker computes before a prompt; short ones overtake long ones there."""
    num_queued = load.num_queued_prompt_tokens
    is_short = num_tokens * (load.num_running + load.num_waiting) < num_queued  # shorter than those in the queue on average
    return min(num_queued, CHUNK_TOKENS) if is_short else num_queued
