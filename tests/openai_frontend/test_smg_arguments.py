"""Which of smg's own options a user may give."""

import re
import subprocess
import sys

import pytest

from kvrelay.errors import ConfigError
from kvrelay.openai_frontend.smg_arguments import GUARDED, parse_arguments


def test_options_that_guard_nothing_are_handed_on() -> None:
    text = "--tool-call-parser llama --policy cache_aware --reasoning-parser=qwen3 --chat-template '/a b.jinja'"
    assert parse_arguments(text)[-1] == "/a b.jinja"
    assert parse_arguments(None) == []


@pytest.mark.parametrize("name", GUARDED)
def test_no_guard_can_be_switched_off(name: str) -> None:
    for argument in (name, f"{name}=x", name[:-1]):
        with pytest.raises(ConfigError, match="decides itself"):
            parse_arguments(f"--policy random {argument} x")


@pytest.mark.parametrize("argument", ["--history-backend", "--history-backend=memory", "--history-b"])
def test_smg_keeps_no_answers_where_clients_have_tenants(argument: str) -> None:
    assert parse_arguments(f"{argument} memory")
    with pytest.raises(ConfigError, match="read each other's answers"):
        parse_arguments(f"{argument} memory", has_tenants=True)


def test_a_text_that_no_shell_would_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="quote it"):
        parse_arguments("--policy 'random")


def test_every_guarded_option_is_one_of_smgs() -> None:
    """A renamed option would be unguarded without a word."""
    pytest.importorskip("smg")
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "smg", "launch", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert set(GUARDED) <= set(re.findall(r"--[a-z0-9-]+", shown))
