"""llguidance's JSON layout and limits, and a vocabulary that needs no model."""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

JSON_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps`. If any white space is allowed, small models write it until max_tokens."""
MAX_LEXER_STATES = 50_000
"""Some MB of a grammar's cache, which its sequences share."""
FIRST_MASK_FUEL = 200_000
MASK_FUEL = 100_000
"""Expressions, which take 100 ns, or ten times that in counted repetitions."""
NUM_BYTES = 256
END_TOKEN = "<|end|>"


def parser_limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES,
        initial_lexer_fuel=FIRST_MASK_FUEL,
        step_lexer_fuel=MASK_FUEL,
        verbose_errors=False,
    )


@lru_cache(maxsize=8)
def byte_tokens(names: tuple[str, ...] = ()) -> "LLTokenizer":
    """Has a token per byte, one that ends, and special ones of these names."""
    from llguidance import LLTokenizer

    # GPT-2's byte-level alphabet writes invisible bytes as characters from 256 on.
    seen = {byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, NUM_BYTES))}
    unseen = [byte for byte in range(NUM_BYTES) if byte not in seen]
    alphabet = seen | {byte: chr(NUM_BYTES + number) for number, byte in enumerate(unseen)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = (END_TOKEN, *(name for name in names if name != END_TOKEN))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": NUM_BYTES + number, "content": name, "special": True} | flags for number, name in enumerate(special)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {alphabet[byte]: byte for byte in range(NUM_BYTES)}, "merges": []},
    }
    return LLTokenizer(json.dumps(tokenizer), n_vocab=NUM_BYTES + len(special), eos_token=NUM_BYTES)
