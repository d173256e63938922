"""How the command line writes errors, JSON, a model's text and tables."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any

from kvrelay import errors
from kvrelay.cli.encodings import writes_all_characters
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

# C0 but tab and line feed, and C1: a model's text must not move the cursor or set the title.
_CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}


def print_error(error: KvrelayError) -> None:
    """To standard error, with advice unless the message has some."""
    advice = next((_ADVICE[kind] for kind in type(error).__mro__ if kind in _ADVICE), "")
    separator = " " if error.message.endswith((".", "?", "!")) else ". "
    message = f"{error.message}{separator}{advice}" if advice else error.message
    print(f"error: {message}", file=sys.stderr)


def print_note(text: str) -> None:
    """To standard error, because standard output holds results only."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """One line, escaped where standard output cannot encode it."""
    print(json.dumps(to_json(value), ensure_ascii=not writes_all_characters(sys.stdout)), flush=True)


def to_json(value: Any) -> Any:
    """Converts dataclasses, enums and times."""
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
    """Writes a model's text; to a terminal without control characters."""
    sys.stdout.write(text.translate(_CONTROL_CHARACTERS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def console(*, stderr: bool = False) -> "Console":
    """Imports rich late, because most commands do not need it."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        # A file or a pipe has no width, and a table must stay whole.
        console.width = _PIPE_WIDTH
    return console
