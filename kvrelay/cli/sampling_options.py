"""Sampling parameters as command line options: a table of them, and the decorator that gives them to a command."""

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from kvrelay.cli.format_options import FORMAT_OPTIONS, parse_format
from kvrelay.errors import InvalidRequestError
from kvrelay.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class _SamplingOption:
    type: Any
    help: str
    metavar: str | None = None


_OPTIONS = {
    "temperature": _SamplingOption(float, "0 is greedy; otherwise logits are divided by it. 0 to 100."),
    "top_k": _SamplingOption(int, "Keep the k likeliest tokens; 0 keeps all."),
    "top_p": _SamplingOption(float, "Keep the smallest set whose probability reaches this. Above 0, to 1."),
    "min_p": _SamplingOption(float, "Drop tokens less likely than this share of the likeliest one's. 0 to 1."),
    "repetition_penalty": _SamplingOption(float, "Above 1 makes tokens that were seen unlikelier. Above 0, to 100."),
    "presence_penalty": _SamplingOption(float, "Subtracted once from logits of tokens generated. -2 to 2."),
    "frequency_penalty": _SamplingOption(float, "Subtracted from logits for every time generated. -2 to 2."),
    "logit_bias": _SamplingOption(str, 'Added to logits of single tokens: {"ID": BIAS, ...}.', "JSON"),
    "seed": _SamplingOption(int, "Makes sampling repeatable. Drawn when absent."),
    "stop": _SamplingOption(list[str], "Output ends before this text. May be repeated.", "TEXT"),
    "stop_token_ids": _SamplingOption(list[int], "Output ends with this token. May be repeated.", "ID"),
    "min_tokens": _SamplingOption(int, "No end before so many tokens."),
    "max_tokens": _SamplingOption(int, "Most tokens to generate. Default: 256, or what the context has room for."),
    "ignore_eos": _SamplingOption(bool, "Go on after the end-of-sequence token."),
    "logprobs": _SamplingOption(int, "Log probabilities with so many alternatives, 0 to 20; see them with --json."),
    "n": _SamplingOption(int, "How many answers to the one prompt, 1 to 8."),
}

assert {*_OPTIONS, "response_format"} == {field.name for field in fields(SamplingParams)}, "an option for every parameter"

_OPTIONS |= {name: _SamplingOption(kind, text, metavar) for name, (kind, metavar, text) in FORMAT_OPTIONS.items()}


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command an option for every sampling parameter, and those given as the argument `sampling`, a dict."""

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
    options = [_parameter(name, option) for name, option in _OPTIONS.items()]
    with_sampling.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    with_sampling.__annotations__ = {}
    return with_sampling


def _parameter(name: str, option: _SamplingOption) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-").removesuffix("-ids")
    declaration = f"{flag}/--no-{flag.removeprefix('--')}" if option.type is bool else flag
    annotation = typer.Option(
        declaration, help=option.help, metavar=option.metavar, show_default=False, rich_help_panel="Sampling"
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[option.type | None, annotation])


def _parse_logit_bias(text: str) -> dict[int, float]:
    try:
        return {int(token_id): float(bias) for token_id, bias in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise InvalidRequestError("logit_bias", f'is {text}; it must be JSON such as {{"42": -5.0}}') from None
