"""Memory that three ways to keep KV set aside for a trace of requests, and how much of it holds
nothing. Arithmetic only.

    maximum size     every sequence gets a buffer for the longest sequence there may be
    doubling         a buffer of twice the size, and a copy into it, whenever the old one is full
    paged            blocks of a fixed size, one more whenever the last one is full (Kwon et al. 2023, "Efficient Memory
                     Management for Large Language Model Serving with PagedAttention")

Time goes in steps: in each, every running sequence gets one token.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvrelay.kv_cache.block_manager import BlockManager, BlockTable

PROMPT_MEDIAN_TOKENS, PROMPT_SPREAD = 180, 1.0
OUTPUT_MEDIAN_TOKENS, OUTPUT_SPREAD = 120, 0.8
"""Of log-normal distributions: many short ones and few long ones, as traces of chats have them."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """A request that begins at a step with its whole prompt and gets a token in each step after it."""

    number: int
    first_step: int
    num_prompt_tokens: int
    num_new_tokens: int

    def num_tokens(self, step: int) -> int:
        """Tokens with KV in this step; 0 before the request and after it."""
        age = step - self.first_step
        return self.num_prompt_tokens + age if 0 <= age < self.num_new_tokens else 0

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to keep KV: what it sets aside for a sequence of so many tokens, and whether it copies
    to make room.
    """

    name: str
    reserved_tokens: Callable[[int], int]
    copies: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What a strategy set aside over the whole trace, in tokens' worth of KV."""

    strategy: str
    reserved_tokens: tuple[int, ...]
    """In each step."""
    num_copied_tokens: int
    """Moved to make room, in all steps."""


def make_trace(num_requests: int, max_tokens: int, steps_between: float, seed: int) -> list[TracedRequest]:
    """Requests of mixed lengths that arrive at random, none longer than `max_tokens`. The same for
    the same seed.

    Args:
        num_requests: in all.
        max_tokens: of prompt and output together, at least 32.
        steps_between: on average, between two arrivals.
        seed: of everything random.
    """
    chance = random.Random(seed)
    trace = []
    now = 0.0
    for number in range(num_requests):
        num_prompt_tokens = _clipped(
            chance.lognormvariate(math.log(PROMPT_MEDIAN_TOKENS), PROMPT_SPREAD), 1, max_tokens - 16
        )
        num_new_tokens = _clipped(
            chance.lognormvariate(math.log(OUTPUT_MEDIAN_TOKENS), OUTPUT_SPREAD), 16, max_tokens - num_prompt_tokens
        )
        trace.append(TracedRequest(number, int(now), num_prompt_tokens, num_new_tokens))
        now += chance.expovariate(1 / steps_between)
    return trace


def _clipped(value: float, least: int, most: int) -> int:
    return min(most, max(least, int(value)))


def maximum_size(max_tokens: int) -> Strategy:
    """A buffer for the longest sequence, whatever its length."""
    return Strategy(f"maximum size, {max_tokens} tokens", lambda _: max_tokens)


def doubling() -> Strategy:
    """A buffer of the next power of two."""
    return Strategy("doubling", lambda num_tokens: 1 << (num_tokens - 1).bit_length(), copies=True)


def paged(block_size: int) -> Strategy:
    """Whole blocks."""
    return Strategy(f"paged, blocks of {block_size}", lambda num_tokens: -(-num_tokens // block_size) * block_size)


def steps_of(trace: Sequence[TracedRequest]) -> Iterator[tuple[int, list[TracedRequest]]]:
    """Every step from the first to the last, with the requests that run in it."""
    for step in range(max(request.end_step for request in trace)):
        yield step, [request for request in trace if request.first_step <= step < request.end_step]


def used_tokens(trace: Sequence[TracedRequest]) -> list[int]:
    """Tokens with KV in each step: what no strategy can do without."""
    return [sum(request.num_tokens(step) for request in running) for step, running in steps_of(trace)]


def simulate(trace: Sequence[TracedRequest], strategy: Strategy) -> Usage:
    """What the strategy sets aside. While a sequence moves to a larger buffer it has both."""
    reserved = []
    num_copied = 0
    for step, running in steps_of(trace):
        total = 0
        for request in running:
            size = strategy.reserved_tokens(request.num_tokens(step))
            total += size
            if strategy.copies and step > request.first_step:
                before = request.num_tokens(step - 1)
                if strategy.reserved_tokens(before) < size:
                    total += strategy.reserved_tokens(before)
                    num_copied += before
        reserved.append(total)
    return Usage(strategy.name, tuple(reserved), num_copied)


def block_manager_usage(trace: Sequence[TracedRequest], block_size: int) -> list[int]:
    """Tokens' worth of the blocks that our block manager really holds in each step of the trace."""
    num_blocks = sum(-(-(request.num_prompt_tokens + request.num_new_tokens) // block_size) for request in trace)
    manager = BlockManager(num_blocks, block_size, enable_prefix_cache=False)
    tables: dict[TracedRequest, BlockTable] = {}
    held = []
    for step, running in steps_of(trace):
        for request in [request for request in tables if request.end_step <= step]:
            manager.release(tables.pop(request))
        for request in running:
            if request in tables:
                manager.grow(tables[request], request.num_tokens(step))
            else:
                tables[request] = manager.allocate(range(request.num_prompt_tokens), "")
        held.append(manager.num_used_blocks * block_size)
    return held


def waste_share(reserved: Sequence[int], used: Sequence[int]) -> float:
    """Share of what was set aside, over all steps, that held nothing."""
    return 1 - sum(used) / sum(reserved)
