"""`kvrelay bench NAME`. Imports benchmarks only to run one, because kvrelay does not need them."""

import importlib
from collections.abc import Sequence
from typing import Any

import typer

from kvrelay.errors import StartupError
from kvrelay.own_packages import services_folder
from kvrelay.runtime.extras import extra_of, missing_extra

_REGISTRY = "benchmarks.registry"
_HELP_NAMES = {"help_option_names": ["-h", "--help"]}
# The benchmark parses its own options, once it is imported.
_PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
_SHORT_HELP = "Measure: engine, memory, cluster, transfer, other engines."


def add_to(app: typer.Typer) -> None:
    """Adds `bench` with a command per benchmark, or without the package one that says so."""
    try:
        # Another package of that name may be installed.
        if not (services_folder() / "benchmarks").is_dir():
            raise ModuleNotFoundError
        registry: Any = importlib.import_module(_REGISTRY)
    except ModuleNotFoundError:
        app.command("bench", help=_SHORT_HELP, context_settings=_PASS_ALL)(_not_installed)
        return
    group = typer.Typer(help=_SHORT_HELP, no_args_is_help=True, context_settings=_HELP_NAMES)
    for name, benchmark in registry.BENCHMARKS.items():
        group.command(name, help=benchmark.summary, context_settings=_PASS_ALL)(_runner(benchmark.module))
    app.add_typer(group, name="bench")


def _not_installed(context: typer.Context) -> None:
    raise StartupError(
        "the package `benchmarks` is not installed; run this from a checkout of kvrelay or from its wheel"
    )


def _runner(module: str) -> Any:
    def run(context: typer.Context) -> None:
        _run_benchmark(module, context.command_path, context.args)

    return run


def _run_benchmark(module_name: str, program: str, arguments: Sequence[str]) -> None:
    """Raises StartupError for a missing library."""
    try:
        module: Any = importlib.import_module(module_name)
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_HELP_NAMES)
        command.command()(module.command)
        command(args=list(arguments), prog_name=program)
    except ModuleNotFoundError as error:
        raise StartupError(
            f"{program} cannot run: {error.name} is not installed; {_advice(error.name or '')}"
        ) from error


def _advice(library: str) -> str:
    if library.partition(".")[0] == "benchmarks":
        return "this version of kvrelay does not have it"
    return missing_extra(extra_of(library))
