"""A chat as people expect one: at a terminal, against a scripted gateway, and its parts without
one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvrelay.cli.chat.input import Command, Input, Message, UnknownCommand, read_input
from kvrelay.cli.chat.typed_ahead import TypedAhead
from kvrelay.errors import OverloadedError
from tests.cli.terminal import Terminal
from tests.support.fake_inference_service import FakeInferenceService, accepted, delta, finished, start_fake

CTRL_C, CTRL_D, ENTER = b"\x03", b"\x04", b"\r"
CHAT = ("-m", "kvrelay.cli", "chat")


class Gateway:
    """Echoes what it is told, in capitals; "stay" gives one word and no more until `go_on`, "fail"
    an error.
    """

    def __init__(self, service: FakeInferenceService) -> None:
        self.service = service
        self.service.converse = self._answer
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()

    async def _answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        words = request.messages[-1].content
        yield accepted()
        if words == "fail":
            raise OverloadedError("too many requests")
        if words == "stay":
            yield delta(0, "I stay")
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise
            yield delta(1, " no more", last=True)
        else:
            yield delta(0, words.upper(), last=True)
        yield finished()

    def sent(self) -> list[list[tuple[str, str]]]:
        return [[(message.role, message.content) for message in call.messages] for call in self.service.calls]


@pytest.fixture
async def gateway(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    service = FakeInferenceService()
    bound, address = await start_fake(service)
    monkeypatch.setenv("KVRELAY_GATEWAY", address)
    monkeypatch.setenv("TERM", "xterm")
    yield Gateway(service)
    await bound.server.stop(None)


class Person:
    """Somebody at a terminal, as far as a test needs them: types, and reads until something is
    shown.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    async def types(self, keys: bytes, then_sees: bytes = b"> ") -> bytes:
        """What is shown from the keys to the end that is waited for."""
        before = len(self._terminal.shown)
        self._terminal.type(keys)
        await asyncio.to_thread(self._terminal.read_until, then_sees)
        return self._terminal.shown[before:]

    async def sees(self, end: bytes) -> None:
        await asyncio.to_thread(self._terminal.read_until, end)

    async def leaves(self, keys: bytes = CTRL_D) -> int:
        self._terminal.type(keys)
        return await asyncio.to_thread(self._terminal.wait)

    @property
    def shown(self) -> bytes:
        return self._terminal.shown


@contextmanager
def at_terminal(*arguments: str) -> Iterator[Person]:
    with Terminal((*CHAT, *arguments)) as terminal:
        yield Person(terminal)


async def test_ctrl_c_ends_the_answer_and_what_was_said_stays_in_the_conversation(gateway: Gateway) -> None:
    with at_terminal("--system", "Be loud.") as person:
        await person.sees(b"> ")
        await person.types(b"stay" + ENTER, then_sees=b"I stay")
        assert b"\r\n" in await person.types(CTRL_C)
        await asyncio.wait_for(gateway.left.wait(), 30)
        assert b"AGAIN\r\n" in await person.types(b"again" + ENTER)
        assert await person.leaves() == 0
    system, first = ("system", "Be loud."), ("user", "stay")
    assert gateway.sent() == [[system, first], [system, first, ("assistant", "I stay"), ("user", "again")]]


async def test_ctrl_c_takes_a_typed_line_back_and_ends_the_chat_only_when_nothing_was_typed(gateway: Gateway) -> None:
    with at_terminal() as person:
        await person.sees(b"> ")
        await person.types(b"half a message", then_sees=b"message")
        await person.types(CTRL_C)
        assert b"Ctrl-C once more" in await person.types(CTRL_C)
        assert b"WHOLE" in await person.types(b"whole" + ENTER)
        assert b"Ctrl-C once more" in await person.types(CTRL_C), "two in a row are meant"
        assert await person.leaves(CTRL_C) == 130
    assert b"Traceback" not in person.shown
    assert gateway.sent() == [[("user", "whole")]]


async def test_what_is_typed_during_an_answer_becomes_the_next_line(gateway: Gateway) -> None:
    with at_terminal() as person:
        await person.sees(b"> ")
        await person.types(b"stay" + ENTER, then_sees=b"I stay")
        answer_begins = len(person.shown)
        person._terminal.type(b"and thenn\x7f\x1b[A")
        gateway.go_on.set()
        await person.sees(b"and then")
        assert person.shown[answer_begins:].startswith(b" no more\r\n"), "not mixed into the answer"
        assert b"AND THEN, PLEASE" in await person.types(b", please" + ENTER)
        assert await person.leaves() == 0
    assert gateway.sent()[1] == [("user", "and then, please")]


async def test_an_error_does_not_end_the_chat_and_its_message_can_be_sent_again(gateway: Gateway) -> None:
    with at_terminal() as person:
        await person.sees(b"> ")
        await person.types(b"hello" + ENTER)
        await person.types(b"fail" + ENTER, then_sees=b"error: too many requests. Try again later.\r\n")
        await person.sees(b"> fail")
        assert b"FAILURE" in await person.types(b"ure" + ENTER)
        assert await person.leaves() == 0
    assert gateway.sent()[2] == [("user", "hello"), ("assistant", "HELLO"), ("user", "failure")]


async def test_what_is_pasted_is_one_message(gateway: Gateway) -> None:
    with at_terminal() as person:
        await person.sees(b"> ")
        await person.types(b"\x1b[200~one\n/exit\ntwo\x1b[201~", then_sees=b"two")
        await person.types(ENTER)
        assert await person.leaves() == 0
    assert gateway.sent() == [[("user", "one\n/exit\ntwo")]]


async def test_a_terminal_that_can_do_nothing_has_a_chat_too(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with at_terminal() as person:
        await person.sees(b"> ")
        assert b"ONE\r\n" in await person.types(b"one" + ENTER)
        assert await person.leaves() == 0
    assert b"\x1b" not in person.shown


async def test_commands_of_a_chat(gateway: Gateway) -> None:
    with at_terminal() as person:
        await person.sees(b"> ")
        help_shown = await person.types(b"/help" + ENTER)
        for name in (b"/clear", b"/system", b"/regen", b"/exit", b'"""'):
            assert name in help_shown
        assert b"/tell is no command" in await person.types(b"/tell me" + ENTER)
        assert b"no message yet" in await person.types(b"/regen" + ENTER)
        for line in (b"one", b"/regen", b"/system Be brief.", b"two", b"/clear", b"three"):
            await person.types(line + ENTER)
        assert b"Be brief." in await person.types(b"/system" + ENTER)
        assert await person.leaves(b"/exit" + ENTER) == 0
    one, system = [("user", "one")], ("system", "Be brief.")
    assert gateway.sent() == [
        one,
        one,
        [system, *one, ("assistant", "ONE"), ("user", "two")],
        [system, ("user", "three")],
    ]


# --- what is said, without a terminal -------------------------------------------------------------


def reading(*lines: str) -> Callable[[str], str]:
    given = iter(lines)

    def read_line(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    return read_line


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["hello"], Message("hello")),
        ([""], None),
        (["  \t"], None),
        (['"""one', "", "two", 'three"""', "four"], Message("one\n\ntwo\nthree")),
        (['"""', "/exit", '"""'], Message("/exit")),
        (['"""short"""'], Message("short")),
        (['""""""'], None),
        (['"""never ended', "more"], Message("never ended\nmore")),
        (["one \\", "two\\", "three"], Message("one \ntwo\nthree")),
        (["one\\"], Message("one")),
        (["//etc/hosts is what?"], Message("/etc/hosts is what?")),
        (["/exit"], Command("exit")),
        (["  /exit"], Message("  /exit")),
        (["/bye"], Command("exit")),
        (["/system Be  brief. "], Command("system", "Be  brief.")),
        (["/system"], Command("system")),
        (["pasted\n/exit"], Message("pasted\n/exit")),
        (["/pasted\nlines"], Message("/pasted\nlines")),
    ],
)
def test_messages_and_commands_are_read(lines: list[str], expected: Input | None) -> None:
    assert read_input(reading(*lines)) == expected


@pytest.mark.parametrize("line", ["/etc/hosts", "/", "/clear all", "/" + "x" * 5000])
def test_a_line_with_a_slash_that_is_no_command_is_not_sent(line: str) -> None:
    given = read_input(reading(line))
    assert isinstance(given, UnknownCommand)
    assert "//" in given.problem
    assert len(given.problem) < 200


def test_the_end_of_the_input_ends_reading() -> None:
    with pytest.raises(EOFError):
        read_input(reading())


@pytest.mark.parametrize(
    ("keys", "text", "is_end"),
    [
        ("", "", False),
        ("words", "words", False),
        ("sent\n", "sent", False),
        ("one\rtwo\r", "one\ntwo", False),
        ("wordz\x7fs", "words", False),
        ("\x7f\x7fa", "a", False),
        ("a\x1b[Db\x1bOAc\x1b[1;5Cd", "abcd", False),
        ("a\x1b", "a", False),
        ("a\x1b[", "a", False),
        ("\x04", "", True),
        ("a\x04", "a", False),
        ("é\x00\x1fß", "éß", False),
    ],
)
def test_keys_typed_ahead_become_the_text_that_they_make(keys: str, text: str, is_end: bool) -> None:
    typed = TypedAhead()
    typed.take(keys)
    assert (typed.text, typed.is_end) == (text, is_end)
