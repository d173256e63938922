"""Where a prompt is computed: on the prefill worker, or on the decode worker that continues it. Pure.

Both ways are compared by when the first token would be there, counted in prompt tokens that are computed before:

    prefill worker   queue + prompt + handoff
    decode worker    (queue + prompt) x slowdown

The handoff stands for what it takes to get the KV and the sequence across. The slowdown is what a prompt costs others: where
sequences decode, a step takes a few tokens of a prompt only; an idle worker lends its cores to the prefill worker, and takes
them back for a prompt of its own. So short prompts stay, long ones leave, and a long queue on one side goes to the other.
"""

from collections.abc import Callable

from kvrelay.work import WorkerLoad

HANDOFF_TOKENS = 128
IDLE_SLOWDOWN = 3
DECODING_SLOWDOWN = 5
CHUNK_TOKENS = 256
"""For how much a prompt that overtakes the others waits: the step under way."""

PlacePrompt = Callable[[str, str, int], bool]
"""From decode worker, prefill worker and the prompt's tokens without KV on the decode worker: whether it stays there."""


def is_sooner_on_decode_worker(num_uncached_tokens: int, decode: WorkerLoad, prefill: WorkerLoad) -> bool:
    """Whether the decode worker is to compute a prompt.

    Args:
        num_uncached_tokens: of the prompt, on the decode worker.
        decode: load of the decode worker that has reserved blocks for it.
        prefill: load of the prefill worker that would compute it otherwise, without this prompt.
    """
    slowdown = DECODING_SLOWDOWN if decode.num_running else IDLE_SLOWDOWN
    on_decode_worker = (decode.num_queued_prompt_tokens + num_uncached_tokens) * slowdown
    on_prefill_worker = _tokens_before(num_uncached_tokens, prefill) + num_uncached_tokens + HANDOFF_TOKENS
    return on_decode_worker < on_prefill_worker


def _tokens_before(num_tokens: int, load: WorkerLoad) -> int:
    """Tokens that the prefill worker computes before a prompt; short ones overtake long ones there."""
    num_queued = load.num_queued_prompt_tokens
    is_short = num_tokens * (load.num_running + load.num_waiting) < num_queued  # shorter than those in the queue on average
    return min(num_queued, CHUNK_TOKENS) if is_short else num_queued
