"""Finds the tokens that end a sequence: all that the files in a model's folder declare.

    generation_config.json     eos_token_id
    config.json                eos_token_id, also of its text_config
    tokenizer_config.json      eos_token, a text
    special_tokens_map.json    the same

All hold, because fine-tuning tools change one file and forget the others.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

_TOKENIZER_FILE = "tokenizer.json"

_log = structlog.get_logger(__name__)


def declared_end_tokens(folder: Path) -> list[int]:
    """Returns ascending ids, perhaps outside of the vocabulary."""
    config = read_object(folder / "config.json")
    declared = [read_object(folder / "generation_config.json"), config]
    declared += [
        part for name in ("text_config", "llm_config", "language_config") if isinstance(part := config.get(name), dict)
    ]
    ids = {token_id for file in declared for token_id in token_ids_in(file.get("eos_token_id"))}
    return sorted(ids | set(_tokenizer_end_tokens(folder)))


def token_ids_in(value: object) -> Iterator[int]:
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0:
            yield entry
        elif entry is not None and entry != -1:  # some configs write -1 for none
            _log.warning("an end-of-sequence token is left out: it is no token id", token_id=repr(entry)[:100])


def within_vocabulary(token_ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    kept: set[int] = set()
    left_out: set[int] = set()
    for token_id in token_ids:
        (kept if 0 <= token_id < vocab_size else left_out).add(token_id)
    if left_out:
        _log.warning(
            "end-of-sequence tokens are left out: they are not in the vocabulary",
            token_ids=sorted(left_out),
            vocab_size=vocab_size,
        )
    return tuple(sorted(kept))


def _tokenizer_end_tokens(folder: Path) -> Iterator[int]:
    config = read_object(folder / "tokenizer_config.json")
    texts = {_text_of(file.get("eos_token")) for file in (config, read_object(folder / "special_tokens_map.json"))}
    wanted = {text for text in texts if text}
    if not wanted:
        return
    tables = (_decoder_table(config), read_object(folder / "added_tokens.json"), _TokenizerTable(folder))
    for text in sorted(wanted):
        token_id = next((found for table in tables if (found := table.get(text)) is not None), None)
        if isinstance(token_id, int) and not isinstance(token_id, bool):
            yield token_id
        else:
            _log.warning("the tokenizer's eos_token is none of its tokens; it ends nothing", eos_token=text[:100])


class _TokenizerTable:
    def __init__(self, folder: Path) -> None:
        self._path = folder / _TOKENIZER_FILE
        self._tokens: Mapping[str, Any] | None = None

    def get(self, text: str) -> object:
        if self._tokens is None:
            self._tokens = _tokens_of(read_object(self._path))
        return self._tokens.get(text)


def _tokens_of(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [text, score] pairs; the index is the id
        vocabulary = {
            entry[0]: token_id for token_id, entry in enumerate(vocabulary) if isinstance(entry, list) and entry
        }
    added = tokenizer.get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return {
        **(vocabulary if isinstance(vocabulary, dict) else {}),
        **{str(entry.get("content")): entry.get("id") for entry in entries},
    }


def _decoder_table(config: Mapping[str, Any]) -> dict[str, int]:
    """Reads {"2": {"content": "</s>", ...}, ...}."""
    decoder = config.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    named = {_text_of(entry): token_id for token_id, entry in entries if token_id.isdecimal()}
    return {text: int(token_id) for text, token_id in named.items() if text}


def _text_of(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """Returns {} for a missing or, with a warning, a broken file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problem = "a model's file cannot be read; it declares nothing"
        _log.warning(problem, file=str(path), error=str(error)[:200])
        return {}
    return value if isinstance(value, dict) else {}
