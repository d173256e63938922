"""A model's tokenizer and chat template, made from the files that a worker sends. Needs neither torch nor transformers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from gateway.chat_template import ChatTemplate, Message
from kvrelay.errors import NoChatTemplateError, PreconditionError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
KNOWN_FILES = frozenset({TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE, SPECIAL_TOKENS_FILE})
"""What a gateway takes from a worker."""


class ModelTokenizer:
    """Text to tokens and back for one model. Its methods take milliseconds for long texts: call them off the event loop.

    Args:
        files: content by name; `tokenizer.json` is needed.

    Raises:
        PreconditionError: a file is missing or broken.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if TOKENIZER_FILE not in files:
            raise PreconditionError(f"the model has no {TOKENIZER_FILE}; send token ids instead of text")
        try:
            self.tokenizer = Tokenizer.from_str(files[TOKENIZER_FILE].decode())
        except Exception as failure:  # tokenizers raises nothing narrower
            raise PreconditionError(f"the model's {TOKENIZER_FILE} is broken: {failure}; send token ids instead") from failure
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = {**_parse_json(files, SPECIAL_TOKENS_FILE), **_parse_json(files, CONFIG_FILE)}
        source = _template_source(files, config)
        self._template = None if source is None else ChatTemplate(source, _special_tokens(config))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text, with the special tokens that the model's tokenizer adds."""
        return self.tokenizer.encode(text, add_special_tokens=True).ids

    def encode_rendered(self, text: str) -> list[int]:
        """Tokens of a rendered chat, or of a part of one: the template wrote all special tokens itself."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def render_chat(self, messages: Sequence[Message], field: str = "messages") -> str:
        """The prompt's text for a chat.

        Raises:
            NoChatTemplateError: the model has no template.
            InvalidRequestError: the template refuses the messages.
        """
        if self._template is None:
            raise NoChatTemplateError("the model has no chat template: send text or token ids, or ask for another model")
        return self._template.render(messages, field)

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """Text of tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)


def _parse_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(files.get(name, b"{}"))
    except ValueError as failure:
        raise PreconditionError(f"the model's {name} is broken: {failure}") from failure
    if not isinstance(parsed, dict):
        raise PreconditionError(f"the model's {name} is broken: it holds no object")
    return parsed


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
