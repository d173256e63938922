"""The root of the command line: which commands there are, and what becomes of errors. Knows nothing of what commands do."""

import os
import sys
from collections.abc import Sequence

import typer

from kvrelay.cli import (
    bench_commands,
    client_commands,
    demo,
    generate_commands,
    model_commands,
    plan_command,
    serve_commands,
    status_commands,
    watch_commands,
)
from kvrelay.cli.output import print_error
from kvrelay.errors import ConfigError, KvrelayError

app = typer.Typer(
    name="kvrelay",
    help="Serves a language model with prefill and decode in separate workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(serve_commands.app, name="serve")
app.add_typer(model_commands.app, name="models")
bench_commands.add_to(app)
for command in (
    generate_commands.complete,
    generate_commands.chat,
    generate_commands.resume,
    status_commands.status,
    status_commands.requests,
    status_commands.health,
    watch_commands.top,
    watch_commands.trace,
    client_commands.cancel,
    client_commands.tokenize,
    client_commands.detokenize,
    plan_command.plan,
    demo.demo,
    client_commands.version,
):
    app.command()(command)


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; see `kvrelay.cli.main`."""
    # Before gRPC is imported: what its C core writes to standard error is said again, and better, by our own errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        app(args=arguments, prog_name="kvrelay")
    except KvrelayError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
