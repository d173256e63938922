"""A chat on a terminal, left in the ways a terminal has."""

import pytest

from tests.cli.terminal import Terminal

CHAT = ("-m", "kvrelay.cli", "chat")

# The hook runs when the prompt has been shown and readline does not wait yet. A C function: in
# Python code the signal would be heard at once.
INTERRUPTED_BEFORE_THE_WAIT = """
import ctypes, functools, readline, signal, sys
readline.set_pre_input_hook(functools.partial(getattr(ctypes.CDLL(None), "raise"), int(signal.SIGINT)))
from kvrelay.cli import main
main(["chat"])
"""


@pytest.mark.parametrize(("keys", "exit_code"), [((b"\x04",), 0), ((b"\x03", b"\x03"), 130)], ids=["Ctrl-D", "Ctrl-C"])
def test_a_chat_that_is_left_leaves_the_shell_a_line_of_its_own(keys: tuple[bytes, ...], exit_code: int) -> None:
    with Terminal(CHAT) as terminal:
        for key in keys:
            terminal.read_until(b"> ")
            terminal.type(key)
        assert terminal.wait() == exit_code
    assert terminal.shown.endswith(b"\r\n")
    assert b"Traceback" not in terminal.shown


def test_ctrl_c_is_heard_when_it_comes_between_the_prompt_and_the_wait_for_a_key() -> None:
    with Terminal(["-c", INTERRUPTED_BEFORE_THE_WAIT]) as terminal:
        assert terminal.wait() == 130
    assert b"> " in terminal.shown
    assert b"Traceback" not in terminal.shown
