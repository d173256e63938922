"""The root of the command line: registers commands and reports errors."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kvrelay.cli import (
    bench_commands,
    certificate_commands,
    client_commands,
    demo,
    generate_commands,
    key_commands,
    model_commands,
    plan_command,
    status_commands,
    watch_commands,
)
from kvrelay.cli.chat import command as chat_command
from kvrelay.cli.encodings import decoded_arguments, prepare_streams
from kvrelay.cli.serve import commands
from kvrelay.cli.views.output import print_error
from kvrelay.errors import ConfigError, KvrelayError


def _show_version(asked: bool) -> None:
    if asked:
        client_commands.version()
        raise typer.Exit


app = typer.Typer(
    name="kvrelay",
    help="Serves a language model with prefill and decode in separate workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", "-V", is_eager=True, callback=_show_version, help="Show the version and end.")
    ] = False,
) -> None:
    pass


app.add_typer(commands.app, name="serve")
app.add_typer(model_commands.app, name="models")
app.add_typer(certificate_commands.app, name="certs")
app.add_typer(key_commands.app, name="keys")
bench_commands.add_to(app)
for command in (
    generate_commands.complete,
    chat_command.chat,
    generate_commands.resume,
    status_commands.status,
    status_commands.requests,
    status_commands.health,
    watch_commands.top,
    watch_commands.trace,
    client_commands.cancel,
    client_commands.tokenize,
    client_commands.detokenize,
    client_commands.protos,
    plan_command.plan,
    demo.demo,
    client_commands.version,
):
    app.command()(command)


def run(arguments: Sequence[str] | None = None) -> None:
    """See `kvrelay.cli.main`."""
    # Before gRPC is imported. Our own errors say better what its C core would log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    prepare_streams()
    try:
        app(args=decoded_arguments(sys.argv[1:] if arguments is None else arguments), prog_name="kvrelay")
    except KvrelayError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
