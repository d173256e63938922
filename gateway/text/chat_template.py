"""Renders chat messages with a model's own Jinja template, as transformers does.

A sandbox limits what a template sees and its steps (loop iterations and calls). The process in
which it runs limits memory and time: see `gateway.text.template_child`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gateway.text.template_source import Message
from kvrelay.core.quoting import shortened
from kvrelay.errors import InvalidRequestError, PreconditionError

MAX_STEPS = 500_000
"""Less than a second; the longest conversation needs a tenth of it."""
MAX_SHOWN_CHARACTERS = 300
MAX_BITS = 4096
"""Of a product or power. Python multiplies larger numbers for minutes, in one step."""
MAX_REPEATED = 100_000
"""Members of a text or list that is multiplied by a number."""
_STEPS_PER_CALL = 10
_BUDGET = "kvrelay budget"
_COUNTED = "kvrelay counted"
"""Names that no template can use."""


class _Budget:
    def __init__(self, num_steps: int) -> None:
        self._num_left = num_steps

    def spend(self, num_steps: int = 1) -> None:
        self._num_left -= num_steps
        if self._num_left < 0:
            raise TemplateError("it takes too many steps")


class _BudgetedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _is_too_large(operator, left, right):
            raise TemplateError(f"it computes {operator} of values that are too large")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno, environment=self)
        return tree

    # Jinja names them so.
    def call(__self, __context: Context, __obj: Any, *arguments: Any, **named: Any) -> Any:
        __context[_BUDGET].spend(_STEPS_PER_CALL)
        return super().call(__context, __obj, *arguments, **named)


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            return left.bit_length() + right.bit_length() > MAX_BITS
        return left.bit_length() * max(right, 0) > MAX_BITS
    number, repeated = (left, right) if isinstance(left, int) else (right, left)
    return isinstance(number, int) and hasattr(repeated, "__len__") and len(repeated) * number > MAX_REPEATED


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget: _Budget = context[_BUDGET]
    for item in items:
        budget.spend()
        yield item


class _GenerationBlock(Extension):
    """Renders the body of `{% generation %}`, which marks text for training."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block as in transformers: assignments in the body do not leave it.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


class _TemplateNamespace(Namespace):
    """As in transformers: no names that begin with an underscore."""

    # As in Jinja, so that `self` may be a name.
    def __init__(*arguments: Any, **named: Any) -> None:
        self, *values = arguments
        attributes = dict(*values, **named)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute that begins with an underscore, such as {name!r}")


class _TemplateDict:
    """`dict` as a function, not a class."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class ChatTemplate:
    """`special_tokens` maps names such as `bos_token` to text.

    Raises:
        PreconditionError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        extensions = [_GenerationBlock, loopcontrols]
        environment = _BudgetedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        del environment.globals["lipsum"]  # writes any amount of text in one step
        environment.filters[_COUNTED] = _counted
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["dict"] = _TemplateDict()
        environment.globals["namespace"] = _TemplateNamespace
        try:
            self._template = environment.from_string(source)
        # Jinja generates Python, which refuses deep nesting with its own errors.
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as failure:
            shown = shortened(str(failure), MAX_SHOWN_CHARACTERS)
            raise PreconditionError(f"the model's chat template is broken: {shown}; send text instead") from failure
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], field: str = "messages") -> str:
        """Raises:
        InvalidRequestError: the template refuses the messages, which the client sent in `field`.
        """
        variables: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            _BUDGET: _Budget(MAX_STEPS),
        }
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **variables)
        # Unexpected messages raise any Python error.
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as failure:
            problem = f"are refused by the model's chat template: {shortened(str(failure), MAX_SHOWN_CHARACTERS)}"
            raise InvalidRequestError(field, problem) from failure


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
