"""`kvrelay chat`: a person, or a pipe, talks with a model."""

import sys
from collections.abc import Callable
from typing import Any

from kvrelay.cli.chat.input import HELP, Command, Input, Message, read_input
from kvrelay.cli.chat.session import ChatSession
from kvrelay.cli.chat.typed_ahead import typed_ahead
from kvrelay.cli.chat.typed_line import LineInterrupted, read_typed_line
from kvrelay.cli.client_session import open_client
from kvrelay.cli.generate_commands import Coalesce, Json, Model, Phases, System, Tenant, show_stream
from kvrelay.cli.sampling_options import takes_sampling
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.standard_input import standard_input_lines
from kvrelay.cli.views.output import print_error, print_note
from kvrelay.config.settings import ClientSettings
from kvrelay.config.sources import SettingsSources
from kvrelay.errors import InvalidRequestError, KvrelayError


@takes_settings(ClientSettings)
@takes_sampling
def chat(
    sources: SettingsSources,
    sampling: dict[str, Any],
    model: Model = "",
    system: System = None,
    tenant: Tenant = "",
    coalesce_ms: Coalesce = None,
    json: Json = False,
    phases: Phases = False,
) -> None:
    """Talk with a model. A line is a turn; Ctrl-C ends an answer, /exit or Ctrl-D ends, /help shows
    more.

    Also takes its turns from a pipe.
    """
    if sampling.get("n", 1) != 1:
        raise InvalidRequestError("n", "must be 1 in a chat: one answer continues the conversation")
    with open_client(sources) as client:
        session = ChatSession(
            lambda: client.converse(model=model, tenant=tenant, coalesce_ms=coalesce_ms, **sampling), system
        )
        try:
            if sys.stdin.isatty():
                _TypedChat(session, json, phases).run()
            else:
                _run_piped(session, json, phases)
        finally:
            session.close()


def _run_piped(session: ChatSession, json: bool, phases: bool) -> None:
    """Turns from a pipe. The first error ends it."""
    lines = standard_input_lines("message")

    def read_line(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    def answer(text: str) -> None:
        shown: list[str] = []
        show_stream(session.send(text), json, phases, shown)
        session.keep_answer("".join(shown))

    while True:
        try:
            given = read_input(read_line)
        except EOFError:
            return
        if given is not None and not _follow(given, session, answer):
            return


class _TypedChat:
    """Continues after errors and interrupted answers."""

    def __init__(self, session: ChatSession, json: bool, phases: bool) -> None:
        self._session = session
        self._json = json
        self._phases = phases
        self._prefill = ""
        self._has_ended = False

    def run(self) -> None:
        """Ctrl-C twice at an empty prompt raises KeyboardInterrupt."""
        print_note("Type a message; Ctrl-C ends an answer, /help shows more, /exit or Ctrl-D ends.")
        interrupted = False
        while not self._has_ended:
            try:
                given = read_input(self._read_line)
                interrupted = False
                if given is not None and not _follow(given, self._session, self._answer):
                    return
            except EOFError:
                print()  # ends our prompt's line
                return
            except LineInterrupted:
                print()
            except KeyboardInterrupt:
                print()
                if interrupted:
                    raise
                interrupted = True
                print_note("Ctrl-C once more, /exit or Ctrl-D ends.")
            except KvrelayError as error:
                print_error(error)

    def _read_line(self, prompt: str) -> str:
        prefill, self._prefill = self._prefill, ""
        return read_typed_line(prompt, prefill)

    def _answer(self, text: str) -> None:
        """Runs a turn. Ctrl-C keeps the answer so far; an error offers the text to send again."""
        shown: list[str] = []
        with typed_ahead() as typed:
            try:
                turn = self._session.send(text)
                try:
                    show_stream(turn, self._json, self._phases, shown)
                    self._session.keep_answer("".join(shown))
                except KeyboardInterrupt:
                    print(flush=True)
                    self._session.keep_answer("".join(shown), is_whole=turn.finished is not None)
                except KvrelayError:
                    if shown and not shown[-1].endswith("\n"):
                        print(flush=True)
                    self._session.take_back()
                    raise
            except KvrelayError as error:
                print_error(error)
                self._prefill = text
        self._prefill = typed.text or self._prefill
        self._has_ended = typed.is_end


def _follow(given: Input, session: ChatSession, answer: Callable[[str], None]) -> bool:
    """Returns False when the chat is over. Raises InvalidRequestError or PreconditionError."""
    if isinstance(given, Message):
        answer(given.text)
    elif not isinstance(given, Command):
        raise InvalidRequestError("message", given.problem)
    elif given.name == "exit":
        return False
    elif given.name == "help":
        print_note(HELP)
    elif given.name == "clear":
        session.clear()
        print_note("A new conversation.")
    elif given.name == "regen":
        answer(session.last_message())
    elif given.argument:
        session.set_system(given.argument)
        print_note("The system message holds from the next message on.")
    else:
        print_note(
            session.system if session.system is not None else "There is no system message; /system TEXT sets one."
        )
    return True
