"""Random texts of a response format, written token by token over a vocabulary of bytes."""

import random

from kvrelay.core.response_format import ResponseFormat
from kvrelay.runtime.large_stack import call_with_large_stack
from kvrelay.structured_output.grammar import CompiledGrammar, compile_over_bytes
from kvrelay.structured_output.grammar_limits import NUM_BYTES

END = NUM_BYTES
LATIN = frozenset(range(0x20, 0x7F))
CLOSING = frozenset(b'"]},')
"""Chosen more often, so that texts end."""


def compile_grammar(response_format: ResponseFormat) -> CompiledGrammar:
    """As processes compile it."""
    return call_with_large_stack(lambda: compile_over_bytes(response_format), "test")


def allowed(mask: bytes | None) -> set[int]:
    """The tokens of a mask."""
    assert mask is not None
    return {token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1}


def random_text(grammar: CompiledGrammar, seed: int, max_tokens: int = 400) -> str | None:
    """A text of the grammar; None if it does not end within the tokens."""
    chance = random.Random(seed)
    matcher, written = grammar.matcher(), list[int]()
    for _ in range(max_tokens):
        (mask,) = matcher.masks(written, [], {END})
        tokens = allowed(mask)
        if END in tokens and (len(tokens) == 1 or chance.random() < 0.5):
            return bytes(written).decode()
        tokens.discard(END)
        closing = sorted(tokens & CLOSING)
        choices = sorted(tokens & LATIN) or sorted(tokens)
        written.append(chance.choice(closing if closing and chance.random() < 0.4 else choices))
    return None


def may_be(grammar: CompiledGrammar, text: str) -> bool:
    """Whether the grammar accepts the whole text."""
    matcher, written = grammar.matcher(), list[int]()
    for byte in text.encode():
        (mask,) = matcher.masks(written, [], {END})
        if byte not in allowed(mask):
            return False
        written.append(byte)
    (mask,) = matcher.masks(written, [], {END})
    return END in allowed(mask)
