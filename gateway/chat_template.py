"""Renders chat messages with a model's own Jinja template, as transformers does, in a sandbox. Knows nothing of tokens.

A template is a program from the model's author. The sandbox keeps it from everything but the messages, and a budget of steps
(turns of loops and calls) ends it, so that no template holds up the gateway. What it may build in memory is not bounded.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.errors import InvalidRequestError, PreconditionError

Message = Mapping[str, str]
"""`role` and `content`."""


MAX_STEPS = 500_000
"""Less than a second; the longest conversation needs a tenth of it."""
_STEPS_PER_CALL = 10
_BUDGET = "kvrelay budget"
_COUNTED = "kvrelay counted"
"""No names that a template could use."""


class _Budget:
    """What is left of one rendering's steps."""

    def __init__(self, num_steps: int) -> None:
        self._num_left = num_steps

    def spend(self, num_steps: int = 1) -> None:
        """Raises TemplateError when nothing is left."""
        self._num_left -= num_steps
        if self._num_left < 0:
            raise TemplateError("it takes too many steps")


class _BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Counts the turns of every loop, whose sequence it sends through a filter, and every call."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno, environment=self)
        return tree

    def call(__self, __context: Context, __obj: Any, *arguments: Any, **named: Any) -> Any:  # names as Jinja has them
        __context[_BUDGET].spend(_STEPS_PER_CALL)
        return super().call(__context, __obj, *arguments, **named)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget: _Budget = context[_BUDGET]
    for item in items:
        budget.spend()
        yield item


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja source from the model's files.
        special_tokens: names such as `bos_token` to their text, which templates use.

    Raises:
        PreconditionError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _BudgetedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters[_COUNTED] = _counted
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
        variables: dict[str, Any] = {**self._special_tokens, "tools": None, "documents": None, _BUDGET: _Budget(MAX_STEPS)}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **variables)
        # What the template's author did not expect raises what Python raises.
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as failure:
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
