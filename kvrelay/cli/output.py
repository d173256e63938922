"""How the command line writes: errors, JSON, text of a model, tables. Knows nothing of commands."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any

from kvrelay import errors
from kvrelay.errors import KvrelayError

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 160

_ADVICE: dict[type[KvrelayError], str] = {
    errors.UnavailableError: "`kvrelay serve all` starts a cluster here; --gateway names another one.",
    errors.DeadlineError: "Give it more time with --timeout, or ask for fewer tokens.",
    errors.OverloadedError: "Try again later.",
    errors.ModelNotFoundError: "See the models that are served with `kvrelay status`.",
    errors.RequestNotFoundError: "See known requests with `kvrelay requests`.",
    errors.NoChatTemplateError: "Use `kvrelay complete` with a plain prompt.",
    errors.InternalError: "The server's log has the detail.",
}

# Everything below a space but tab and line feed, and the C1 controls: a model's text must not move the cursor or set the title.
_CONTROL_CHARACTERS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def print_error(error: KvrelayError) -> None:
    """One error on standard error: what is wrong, and what to do where the message does not say so."""
    advice = next((_ADVICE[kind] for kind in type(error).__mro__ if kind in _ADVICE), "")
    separator = " " if error.message.endswith((".", "?", "!")) else ". "
    message = f"{error.message}{separator}{advice}" if advice else error.message
    print(f"error: {message}", file=sys.stderr)


def print_note(text: str) -> None:
    """A remark for a person, on standard error, so that standard output holds results only."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """A value as one line of JSON."""
    print(json.dumps(to_json(value), ensure_ascii=False), flush=True)


def to_json(value: Any) -> Any:
    """Values made of dataclasses, enums and times as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        return round(value, 4)
    return value


def write_text(text: str) -> None:
    """Text of a model, as it comes; on a terminal without control characters."""
    sys.stdout.write(text.translate(_CONTROL_CHARACTERS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def console(*, stderr: bool = False) -> "Console":
    """A rich console; imported late, since most commands need none."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH  # a file or a pipe has no width, and nothing of a table must be lost
    return console
