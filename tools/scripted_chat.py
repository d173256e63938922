"""`kvrelay chat` on a terminal: asks, reads the answer, asks again and leaves. Part of
tools/newcomer.sh.

python -m tools.scripted_chat PROGRAM ARGUMENTS...     such as: .venv/bin/kvrelay chat
"""

import os
import sys

from tests.cli.terminal import Terminal

QUESTIONS = ("What is the capital of France?", "And of Italy?")
PROMPT = b"> "
CTRL_D = b"\x04"
# The terminal runs Python, which becomes the program.
BECOME = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"


def main() -> int:
    """Exit code: 1 where it did not answer or did not end well."""
    os.environ["TERM"] = "dumb"  # no escape sequences before the prompt
    with Terminal(["-c", BECOME, *sys.argv[1:]]) as terminal:
        terminal.read_until(PROMPT)
        for question in QUESTIONS:
            terminal.type(question.encode() + b"\r")
            terminal.read_until(question[-1:].encode())  # its echo
            terminal.read_until(b"\n")
            begin = len(terminal.shown)
            terminal.read_until(b"\n" + PROMPT)
            answer = terminal.shown[begin:].removesuffix(PROMPT).strip()
            print(f"{question} {answer.decode('utf-8', 'replace')}")
            if not answer:
                return 1
        terminal.type(CTRL_D)
        exit_code = terminal.wait()
    print(f"it ended with {exit_code}")
    return 1 if exit_code else 0


if __name__ == "__main__":
    sys.exit(main())
