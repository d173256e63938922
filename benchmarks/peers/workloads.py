"""What the engines are asked to do: requests of random token ids, the same for all engines of a
round.

    w1    one stream: 128 prompt tokens, 128 new
    ttft  one prompt of 32, of 512 and of 2,048 tokens, one new token each
    w2    16 at once: 128 prompt tokens, 64 new each
    w3    4 streams (64 prompt tokens, 600 new) while a prompt of 2,048 tokens arrives every 8 s, at most four; and the same
          4 streams without the prompts

No prompt begins like another, so that no prefix cache shortens one. Knows nothing of engines.
"""

import random
from dataclasses import dataclass

from benchmarks.peers.adapters.adapter_loop import Request

PROMPT_TOKEN_IDS = range(300, 10_000)
"""Above where special tokens lie, below the end of any vocabulary."""
TTFT_PROMPT_TOKENS = (32, 512, 2048)
NUM_STREAMS = 4
LONG_PROMPT_TOKENS = 2048
LONG_PROMPT_NEW_TOKENS = 2
LONG_PROMPT_INTERVAL_S = 8.0
MAX_LONG_PROMPTS = 4
FIRST_LONG_PROMPT_S = 2.0
"""When the streams have begun to decode."""


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine is given at once, and how its result is called."""

    workload: str
    name: str
    requests: tuple[Request, ...]


def runs_of(workload: str, round_number: int, stream_tokens: int) -> list[Run]:
    """The runs of a workload in a round.

    Args:
        workload: one of the names above.
        round_number: other rounds have other prompts.
        stream_tokens: new tokens of each of w3's streams.
    """
    chance = random.Random(f"{workload} {round_number}")

    def request(request_id: int, prompt_tokens: int, max_tokens: int, at_s: float | None = None) -> Request:
        prompt = chance.choices(PROMPT_TOKEN_IDS, k=prompt_tokens)
        return Request(request_id, prompt, max_tokens, at_s or 0.0, background=at_s is not None)

    def streams() -> tuple[Request, ...]:
        return tuple(request(number, 64, stream_tokens) for number in range(NUM_STREAMS))

    if workload == "w1":
        return [Run(workload, "w1", (request(0, 128, 128),))]
    if workload == "ttft":
        return [Run(workload, f"ttft-{length}", (request(0, length, 1),)) for length in TTFT_PROMPT_TOKENS]
    if workload == "w2":
        return [Run(workload, "w2", tuple(request(number, 128, 64) for number in range(16)))]
    assert workload == "w3", f"no such workload: {workload}"
    times_s = [FIRST_LONG_PROMPT_S + number * LONG_PROMPT_INTERVAL_S for number in range(MAX_LONG_PROMPTS)]
    prompts = tuple(
        request(NUM_STREAMS + number, LONG_PROMPT_TOKENS, LONG_PROMPT_NEW_TOKENS, at_s)
        for number, at_s in enumerate(times_s)
    )
    return [Run(workload, "w3-quiet", streams()), Run(workload, "w3", streams() + prompts)]


def warm_up(workload: str) -> tuple[Request, ...]:
    """What an engine does once, not measured, before the rounds of a workload: its shapes with few
    tokens.
    """
    if workload == "w3":
        return _shortened(runs_of(workload, -1, 4)[0])
    return _shortened(runs_of(workload, -1, 4)[-1])


def _shortened(run: Run) -> tuple[Request, ...]:
    return tuple(Request(each.request_id, each.token_ids, min(4, each.max_tokens)) for each in run.requests)
