"""A model's tokenizer and chat template, made from a worker's files. Needs no transformers."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from gateway.text.control_tokens import ControlTokens
from gateway.text.template_source import TemplateSource
from gateway.text.token_text import TokenTexts
from kvrelay.errors import NoChatTemplateError, PreconditionError
from kvrelay.models.tokenizer_settings import add_tokens

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
KNOWN_FILES = frozenset({TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE, SPECIAL_TOKENS_FILE})

# One text is tokenized at a time, so the library's threads would stay idle.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class EncodedText(NamedTuple):
    num_tokens: int
    token_ids: list[int] | None
    """None if they are too many."""


class ModelTokenizer:
    """Call it off the event loop for long texts.

    Uses the library's batch functions, because only they release the interpreter lock.

    Raises:
        PreconditionError: a file is missing or broken.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if TOKENIZER_FILE not in files:
            raise PreconditionError(f"the model has no {TOKENIZER_FILE}; send token ids instead of text")
        try:
            self.tokenizer = Tokenizer.from_str(files[TOKENIZER_FILE].decode())
        except Exception as failure:  # tokenizers raises nothing narrower
            raise PreconditionError(
                f"the model's {TOKENIZER_FILE} is broken: {failure}; send token ids instead"
            ) from failure
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = {**_parse_json(files, SPECIAL_TOKENS_FILE), **_parse_json(files, CONFIG_FILE)}
        add_tokens(self.tokenizer, config)
        self._template, self._template_problem = _find_template(files, config)
        self.token_texts = TokenTexts(self.tokenizer)
        self.control_tokens = ControlTokens(
            token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special
        )
        self.longest_token_bytes = _longest_token_bytes(self.tokenizer)

    @property
    def template(self) -> TemplateSource | None:
        """Not compiled yet: it may turn out to be broken."""
        return self._template

    def encode(self, text: str, max_tokens: int, *, rendered: bool = False) -> EncodedText:
        """A `rendered` chat has its special tokens; other texts get the tokenizer's own."""
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=not rendered)
        num_tokens = len(encoding)
        return EncodedText(num_tokens, encoding.ids if num_tokens <= max_tokens else None)

    def require_template(self) -> TemplateSource:
        """Raises:
        NoChatTemplateError: the model has no template.
        PreconditionError: the file that should have it is broken.
        """
        if self._template_problem is not None:
            raise PreconditionError(self._template_problem)
        if self._template is None:
            raise NoChatTemplateError(
                "the model has no chat template: send text or token ids, or ask for another model"
            )
        return self._template

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        (text,) = self.tokenizer.decode_batch([list(token_ids)], skip_special_tokens=not keep_special_tokens)
        return text


def _longest_token_bytes(tokenizer: Tokenizer) -> int:
    """Asks token by token: one call for the whole vocabulary would stop all other threads."""
    added = tokenizer.get_added_tokens_decoder()
    longest = max((len(token.content.encode()) for token in added.values()), default=1)
    for token_id in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        token = tokenizer.id_to_token(token_id)
        if token is not None:
            longest = max(longest, len(token.encode()))
    return longest


def _parse_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(files.get(name, b"{}"))
    except ValueError as failure:
        raise PreconditionError(f"the model's {name} is broken: {failure}") from failure
    if not isinstance(parsed, dict):
        raise PreconditionError(f"the model's {name} is broken: it holds no object")
    return parsed


def may_have_template(files: Mapping[str, bytes]) -> bool:
    """Before the files are parsed, which takes a moment."""
    return TEMPLATE_FILE in files or TEMPLATE_JSON_FILE in files or b'"chat_template"' in files.get(CONFIG_FILE, b"")


def _find_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tuple[TemplateSource | None, str | None]:
    """Returns a problem instead of raising, because text and token ids need no template."""
    try:
        source = _template_source(files, config)
    except PreconditionError as error:
        return None, error.message
    return None if source is None else TemplateSource(source, tuple(_special_tokens(config).items())), None


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode(errors="replace")
    source = _parse_json(files, TEMPLATE_JSON_FILE).get("chat_template", config.get("chat_template"))
    if isinstance(source, list):  # several templates by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens
