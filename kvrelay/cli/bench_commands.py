"""`kvrelay bench NAME`: runs a benchmark of the package `benchmarks`. Knows their names only from its registry.

The package and what a benchmark needs are imported when one runs: neither the command line nor kvrelay depends on them.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import typer

from kvrelay.errors import StartupError

_REGISTRY = "benchmarks.registry"
_HELP_NAMES = {"help_option_names": ["-h", "--help"]}
# The benchmark's own options are read by itself, once it is imported.
_PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
_SHORT_HELP = "Measure: engine, memory, cluster, transfer, other engines."
_LIBRARIES_OF_EXTRA = {"bench": ("matplotlib", "psutil"), "worker": ("torch", "transformers", "safetensors", "numpy")}


def add_to(app: typer.Typer) -> None:
    """Adds `bench` with a command for each benchmark; where there is no package `benchmarks`, one that says so."""
    try:
        registry: Any = importlib.import_module(_REGISTRY)
    except ModuleNotFoundError:
        app.command("bench", help=_SHORT_HELP, context_settings=_PASS_ALL)(_not_installed)
        return
    group = typer.Typer(help=_SHORT_HELP, no_args_is_help=True, context_settings=_HELP_NAMES)
    for name, benchmark in registry.BENCHMARKS.items():
        group.command(name, help=benchmark.summary, context_settings=_PASS_ALL)(_runner(benchmark.module))
    app.add_typer(group, name="bench")


def _not_installed(context: typer.Context) -> None:
    raise StartupError("the package `benchmarks` is not installed; run this from a checkout of kvrelay or from its wheel")


def _runner(module: str) -> Any:
    def run(context: typer.Context) -> None:
        _run_benchmark(module, context.command_path, context.args)

    return run


def _run_benchmark(module_name: str, program: str, arguments: Sequence[str]) -> None:
    """Imports a benchmark and runs its command.

    Raises:
        StartupError: a library that it needs is not installed.
    """
    try:
        module: Any = importlib.import_module(module_name)
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_HELP_NAMES)
        command.command()(module.command)
        command(args=list(arguments), prog_name=program)
    except ModuleNotFoundError as error:
        raise StartupError(f"{program} cannot run: {error.name} is not installed; {_advice(error.name or '')}") from error


def _advice(library: str) -> str:
    if library.partition(".")[0] == "benchmarks":
        return "this version of kvrelay does not have it"
    root = library.partition(".")[0]
    extra = next((extra for extra, libraries in _LIBRARIES_OF_EXTRA.items() if root in libraries), "all")
    return f"install it: pip install 'kvrelay[{extra}]'"
