"""Commands of the model store."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.views.output import console, print_json, print_note
from kvrelay.config.settings import EngineSettings
from kvrelay.config.sources import SettingsSources

if TYPE_CHECKING:
    from kvrelay.models.sources import Progress
    from kvrelay.models.store import ModelStore

app = typer.Typer(help="Models in the model store: list (default), add, path, remove.")

Json = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]
Name = Annotated[str, typer.Argument(help="Name in the store; also a folder, a GGUF file or a hub's name.")]

_MIB = 1024 * 1024
_store_settings = takes_settings(EngineSettings, only={"model_dir"})


@app.callback(invoke_without_command=True)
@_store_settings
def models(sources: SettingsSources, context: typer.Context, json: Json = False) -> None:
    """Models in the model store: list (default), add, path, remove."""
    if context.invoked_subcommand is None:
        _show_models(open_store(sources), json)


@app.command("list")
@_store_settings
def list_models(sources: SettingsSources, json: Json = False) -> None:
    """List the models in the store."""
    _show_models(open_store(sources), json)


@app.command()
@_store_settings
def add(
    sources: SettingsSources,
    name: Name,
    source: Annotated[
        Path | None, typer.Argument(help="Folder or GGUF file. Default: the demo model, or the hub.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="What a GGUF file's weights are converted to.")] = "float32",
    link: Annotated[bool, typer.Option("--link", help="Link to the folder instead of copying it.")] = False,
) -> None:
    """Put a model into the store, and show its folder."""
    store = open_store(sources)
    with progress_bar() as progress:
        if source is None:
            print(store.ensure(name, progress))
        else:
            print(store.add_model(name, source, dtype=dtype, link=link, progress=progress))


@app.command()
@_store_settings
def path(sources: SettingsSources, name: Name) -> None:
    """Show a model's folder."""
    print(open_store(sources).resolve(name))


@app.command()
@_store_settings
def remove(sources: SettingsSources, name: Annotated[str, typer.Argument(help="Name in the store.")]) -> None:
    """Delete a model from the store."""
    open_store(sources).remove_model(name)


def open_store(sources: SettingsSources) -> "ModelStore":
    """Raises ConfigError."""
    from kvrelay.cli.serve.preflight import store_of

    return store_of(sources.load("models", EngineSettings))


def prepare_models(engines: Iterable[EngineSettings]) -> None:
    """Before any process waits for them. Raises ModelLoadError."""
    from kvrelay.cli.serve.preflight import store_of
    from kvrelay.runtime.cache_folder import falls_back

    with progress_bar() as progress:
        for settings in {(engine.model, engine.model_dir): engine for engine in engines}.values():
            store = store_of(settings)
            if falls_back(store.root.parent):
                print_note(
                    f"note: without a home, models are kept in {store.root}, which may not last; set KVRELAY_MODEL_DIR"
                )
            store.ensure(settings.model, progress)


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """On standard error; lines without a terminal. No remaining time, because stages vary too much."""
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    bar = Bar(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task("", total=1.0)
    last = ("", -1)

    def report(stage: str, fraction: float) -> None:
        nonlocal last
        if bar.disable and last != (stage, tenth := int(fraction * 10)):
            print_note(f"{fraction:4.0%} {stage}")
            last = (stage, tenth)
        bar.start()
        bar.update(task, description=stage, completed=fraction)

    try:
        yield report
    finally:
        bar.stop()


def _show_models(store: "ModelStore", json: bool) -> None:
    found = store.list_models()
    if json:
        for model in found:
            print_json(
                {
                    "name": model.name,
                    "path": str(model.path),
                    "size_bytes": model.size_bytes,
                    "architecture": model.architecture,
                    "dtype": model.dtype,
                    "sampling_defaults": model.sampling_defaults.stated(),
                }
            )
        return
    if not found:
        from kvrelay.models.store import DEMO_MODEL

        print_note(f"There is no model in {store.root} yet. `kvrelay models add {DEMO_MODEL}` brings the demo model.")
        return
    from kvrelay.cli.views.fitted_table import FittedTable

    table = FittedTable(f"Models in {store.root}")
    for column in ("name", "architecture", "dtype", "size", "sampling", "folder"):
        table.add_text_column(column, right=column == "size")
    for model in found:
        sampling = ", ".join(f"{name} {value:g}" for name, value in model.sampling_defaults.stated().items())
        size = f"{model.size_bytes / _MIB:,.0f} MiB"
        table.add_texts(model.name, model.architecture, model.dtype, size, sampling, str(model.path))
    console().print(table)
