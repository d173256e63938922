"""Commands that make API keys."""

import datetime
import re
import secrets
from typing import Annotated

import typer
import yaml

from kvrelay.cli.views.output import print_json, print_note
from kvrelay.errors import ConfigError

app = typer.Typer(help="API keys of a cluster's clients.", no_args_is_help=True)


@app.callback()
def keys() -> None:
    """API keys of a cluster's clients."""


@app.command("new")
def new(
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose requests and prefix cache the key has.", show_default=False)
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role", help="client, operator, metrics or front; repeatable. Default: client.", show_default=False
        ),
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="Name in logs and counts. Default: a random one.")] = None,
    days: Annotated[
        int | None, typer.Option("--days", min=1, max=36500, help="Days until it expires. Default: never.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON, for programs.")] = False,
) -> None:
    """Show a new key, and the entry of the keys file that lets it in.

    The key is shown once: only its hash goes into the file.
    """
    from kvrelay.security.keys import digest_of, new_key, parse_keys

    key = new_key()
    entry: dict[str, object] = {"id": id or f"key-{secrets.token_hex(4)}", "sha256": digest_of(key)}
    if tenant is not None:
        entry["tenant"] = tenant
    entry["roles"] = list(role or ("client",))
    if days is not None:
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        entry["expires"] = expires.isoformat(timespec="seconds")
    text = _entry_text(entry)
    try:
        parse_keys(f"keys:\n{text}".encode())
    except ConfigError as failure:
        raise ConfigError(f"no such key can be made, because its entry {failure.message}") from None
    if json:
        print_json({"key": key, "entry": entry})
        return
    print_note("The key, shown this once. Its entry below goes under `keys:` in the keys file.")
    print(key, text, sep="\n", end="")


def _entry_text(entry: dict[str, object]) -> str:
    """A time stands there without quotes, as YAML has times."""
    text: str = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
    return re.sub(r"^( +expires: )'(.*)'$", r"\1\2", text, flags=re.MULTILINE)
