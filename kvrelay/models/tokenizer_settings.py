"""Adds the tokens of tokenizer_config.json to a tokenizer, as transformers does."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*')
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Ignores `add_bos_token` and `add_eos_token`, as transformers does beside a tokenizer.json.

    `config` is special_tokens_map.json, overridden by tokenizer_config.json.
    """
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in _listed_tokens(config) if repr(token) not in known])
    tokenizer.add_special_tokens(list(_special_tokens(config)))


def complete_tokenizer_json(tokenizer_json: str, config: Mapping[str, Any]) -> str:
    """Is cheap where no token is missing; else parses the text and may raise anything."""
    wanted = {token.content: token.special for token in (*_listed_tokens(config), *_special_tokens(config))}
    if wanted.items() <= _known_tokens(tokenizer_json).items():
        return tokenizer_json
    tokenizer = Tokenizer.from_str(tokenizer_json)
    add_tokens(tokenizer, config)
    return str(tokenizer.to_str())


def _known_tokens(tokenizer_json: str) -> dict[str, bool]:
    """Parses only this list, because parsing the whole file takes a second."""
    decoder = json.JSONDecoder()
    for match in _ADDED_TOKENS.finditer(tokenizer_json):
        try:
            entries, _ = decoder.raw_decode(tokenizer_json, match.end())
        except ValueError:
            continue
        if isinstance(entries, list):
            return {
                str(entry.get("content")): bool(entry.get("special")) for entry in entries if isinstance(entry, dict)
            }
    return {}


def _listed_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Reads {"7": {"content": "<x>", "special": true, ...}, ...}."""
    decoder = config.get("added_tokens_decoder")
    entries = decoder if isinstance(decoder, dict) else {}
    for token_id in sorted((key for key in entries if str(key).isdecimal()), key=int):
        if (token := _parse_token(entries[token_id])) is not None:
            yield token


def _special_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    named = [value for name, value in config.items() if name.endswith("_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        further = config.get(name)
        named += further if isinstance(further, list) else further.values() if isinstance(further, dict) else []
    for value in named:
        token = (
            AddedToken(value, special=True, normalized=False)
            if isinstance(value, str) and value
            else _parse_token(value)
        )
        if token is not None:
            yield token


def _parse_token(entry: object) -> AddedToken | None:
    if not isinstance(entry, dict) or not isinstance(content := entry.get("content"), str) or not content:
        return None
    return AddedToken(content, **{name: bool(entry[name]) for name in _FLAGS if name in entry})
