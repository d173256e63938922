"""Renders chat messages with a model's own Jinja template, as transformers does, in a sandbox. Knows nothing of tokens."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.errors import InvalidRequestError, PreconditionError

Message = Mapping[str, str]
"""`role` and `content`."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja source from the model's files.
        special_tokens: names such as `bos_token` to their text, which templates use.

    Raises:
        PreconditionError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as failure:
            raise PreconditionError(f"the model's chat template is broken: {failure.message}; send text instead") from failure
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], field: str = "messages") -> str:
        """The prompt that asks for the assistant's next message.

        Args:
            messages: the chat.
            field: where the client sent it.

        Raises:
            InvalidRequestError: the template refuses the messages.
        """
        variables: dict[str, Any] = {**self._special_tokens, "tools": None, "documents": None}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **variables)
        # A template is a program from the model's author: what it does not expect raises what Python raises.
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as failure:
            raise InvalidRequestError(field, f"are refused by the model's chat template: {failure}") from failure


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
