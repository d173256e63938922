"""`kvrelay keys new` shows a key once, with an entry that lets it in."""

import json

import pytest

from kvrelay.cli.app import run
from kvrelay.security.keys import parse_keys
from kvrelay.security.principal import Role


def test_the_shown_entry_lets_the_shown_key_in(capsys: pytest.CaptureFixture[str]) -> None:
    run_it("keys", "new", "--tenant", "müller", "--role", "client", "--role", "metrics", "--id", "m-1", "--days", "30")
    key, _, entry = capsys.readouterr().out.partition("\n")
    principal = parse_keys(f"keys:\n{entry}".encode()).find(key)
    assert principal is not None
    assert (principal.tenant, principal.key_id) == ("müller", "m-1")
    assert principal.roles == {Role.CLIENT, Role.METRICS}
    assert principal.expires_at_s is not None
    assert key not in entry


def test_as_json_it_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    run_it("keys", "new", "--role", "operator", "--json")
    shown = json.loads(capsys.readouterr().out)
    principal = parse_keys(json.dumps({"keys": [shown["entry"]]}).encode()).find(shown["key"])
    assert principal is not None
    assert principal.is_operator


def test_a_key_that_no_file_could_have_is_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["keys", "new"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tenant" in captured.err


def run_it(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(list(arguments))
    assert ended.value.code == 0
