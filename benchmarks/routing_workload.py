"""Conversations with system prompts of which few are popular, as requests of many users have them.
Knows nothing of workers.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

VOCAB_SIZE = 50_000


@dataclass(frozen=True, slots=True)
class Mix:
    """What users ask. Times are seconds."""

    num_conversations: int = 600
    conversations_per_s: float = 2.0
    num_system_prompts: int = 40
    zipf_exponent: float = 1.0
    """The popularity of the system prompt of rank k is 1 / k^exponent."""
    system_tokens: int = 512
    message_tokens: int = 48
    answer_tokens: int = 64
    mean_turns: float = 4.0
    """Of a conversation, geometrically distributed."""
    think_s: float = 4.0
    """Mean time between an answer and the next message."""


@dataclass(frozen=True, slots=True)
class Turn:
    """`prompt` is all of the conversation so far."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    think_s: float
    """Before the turn."""


@dataclass(frozen=True, slots=True)
class Conversation:
    number: int
    begins_at: float
    turns: tuple[Turn, ...]


def make_conversations(mix: Mix, seed: int) -> list[Conversation]:
    """The same for the same seed, ordered by begin."""
    chance = random.Random(seed)
    systems = [_tokens(chance, mix.system_tokens) for _ in range(mix.num_system_prompts)]
    weights = list(itertools.accumulate(1 / rank**mix.zipf_exponent for rank in range(1, mix.num_system_prompts + 1)))
    conversations, now = [], 0.0
    for number in range(mix.num_conversations):
        now += chance.expovariate(mix.conversations_per_s)
        (system,) = chance.choices(systems, cum_weights=weights)
        conversations.append(Conversation(number, now, _turns(mix, system, chance)))
    return conversations


def _turns(mix: Mix, system: Sequence[int], chance: random.Random) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    text = tuple(system)
    while not turns or chance.random() < 1 - 1 / mix.mean_turns:
        prompt = text + _tokens(chance, mix.message_tokens)
        answer = _tokens(chance, mix.answer_tokens)
        turns.append(Turn(prompt, answer, chance.expovariate(1 / mix.think_s) if turns else 0.0))
        text = prompt + answer
    return tuple(turns)


def _tokens(chance: random.Random, number: int) -> tuple[int, ...]:
    return tuple(chance.randrange(VOCAB_SIZE) for _ in range(number))
