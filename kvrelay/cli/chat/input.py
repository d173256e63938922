"""What a person types in a chat: messages of one or several lines, and slash commands."""

from collections.abc import Callable
from dataclasses import dataclass

PROMPT = "> "
MORE_PROMPT = "... "
_QUOTES = '"""'

HELP = '''\
/help            show this
/clear           forget the conversation; the system message stays
/system [TEXT]   show the system message, or set it for what follows
/regen           answer the last message again
/exit            end; so do Ctrl-D, and Ctrl-C twice
Ctrl-C           end the answer that is being written; what it said so far stays in the conversation
"""              begin a message of several lines, which the next """ ends; a line that ends with \\ goes on in the next
//...            send a message that begins with a slash'''

_NAMES = ("help", "clear", "system", "regen", "exit")
_OTHER_NAMES = {"?": "help", "quit": "exit", "bye": "exit"}


@dataclass(frozen=True, slots=True)
class Message:
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """One of `_NAMES`, without the slash."""

    name: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class UnknownCommand:
    problem: str


Input = Message | Command | UnknownCommand


def read_input(read_line: Callable[[str], str]) -> Input | None:
    """The next message or command; None for an empty line.

    `read_line` gets a prompt and returns a line without its end. Its EOFError ends a message that
    has begun, and is raised otherwise.
    """
    line = read_line(PROMPT)
    if line.lstrip().startswith(_QUOTES):
        return _message(_read_quoted(line.lstrip().removeprefix(_QUOTES), read_line))
    if line.endswith("\\"):
        return _message(_read_continued(line, read_line))
    if line.startswith("//"):
        return _message(line[1:])
    if line.startswith("/") and "\n" not in line:
        return _command(line)
    return _message(line)


def _read_quoted(line: str, read_line: Callable[[str], str]) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(_QUOTES):
        try:
            lines.append(read_line(MORE_PROMPT))
        except EOFError:
            break
    else:
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def _read_continued(line: str, read_line: Callable[[str], str]) -> str:
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        try:
            lines.append(read_line(MORE_PROMPT))
        except EOFError:
            break
    return "\n".join(lines)


def _message(text: str) -> Message | None:
    return Message(text) if text.strip() else None


def _command(line: str) -> Command | UnknownCommand:
    word, _, argument = line[1:].strip().partition(" ")
    name = _OTHER_NAMES.get(word, word)
    if name not in _NAMES:
        return UnknownCommand(
            f"/{word[:40]} is no command: /help shows all; a message that begins with / is typed with //"
        )
    if argument and name != "system":
        return UnknownCommand(f"/{word} takes nothing after it; a message that begins with / is typed with //")
    return Command(name, argument.strip())
