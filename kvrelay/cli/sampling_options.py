"""Sampling parameters as command line options."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from kvrelay.cli.format_options import FORMAT_OPTIONS, parse_format
from kvrelay.core.sampling_params import PARAMETERS, Parameter
from kvrelay.errors import InvalidRequestError

_OPTION_TYPES: dict[Any, tuple[Any, str | None, str]] = {
    float: (float, None, ""),
    int: (int, None, ""),
    int | None: (int, None, ""),
    bool: (bool, None, ""),
    tuple[str, ...]: (list[str], "TEXT", "May be repeated."),
    tuple[int, ...]: (list[int], "ID", "May be repeated."),
    Mapping[int, float]: (str, "JSON", 'As {"ID": NUMBER, ...}.'),
}
"""By a parameter's type: option type, metavar, and addition to the help."""
_USAGE = {"logprobs": "See them with --json."}


def _from_table(parameter: Parameter) -> tuple[Any, str | None, str]:
    kind, metavar, usage = _OPTION_TYPES[parameter.type]
    limits = f"{parameter.limits[0].upper()}{parameter.limits[1:]}." if parameter.limits else ""
    texts = [parameter.help, limits, usage or _USAGE.get(parameter.name, ""), f"Default: {parameter.default_text}."]
    return kind, metavar, " ".join(filter(None, texts))


_OPTIONS = {
    name: _from_table(parameter) for name, parameter in PARAMETERS.items() if name != "response_format"
} | FORMAT_OPTIONS
"""Type, metavar and help of each."""


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option per parameter. The command gets those given as the dict `sampling`."""

    @functools.wraps(command)
    def with_sampling(*positional: Any, **arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in _OPTIONS}
        given["response_format"] = parse_format({name: given.pop(name) for name in FORMAT_OPTIONS})
        sampling = {name: value for name, value in given.items() if value is not None and value != []}
        if "logit_bias" in sampling:
            sampling["logit_bias"] = _parse_logit_bias(sampling["logit_bias"])
        command(*positional, sampling=sampling, **arguments)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "sampling"]
    options = [_parameter(name, *option) for name, option in _OPTIONS.items()]
    with_sampling.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    with_sampling.__annotations__ = {}
    return with_sampling


def _parameter(name: str, kind: Any, metavar: str | None, help: str) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-").removesuffix("-ids")
    declaration = f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag
    option = typer.Option(declaration, help=help, metavar=metavar, show_default=False, rich_help_panel="Sampling")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _parse_logit_bias(text: str) -> dict[int, float]:
    try:
        return {int(token_id): float(bias) for token_id, bias in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise InvalidRequestError("logit_bias", f'is {text}; it must be JSON such as {{"42": -5.0}}') from None
