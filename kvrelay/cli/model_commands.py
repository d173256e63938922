"""Commands of the model store: what is there, where it lies, put in, take out. Knows nothing of how models are converted."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.output import console, print_json, print_note
from kvrelay.cli.setting_options import takes_settings
from kvrelay.config import EngineSettings
from kvrelay.settings_sources import SettingsSources

if TYPE_CHECKING:
    from kvrelay.model_sources import Progress
    from kvrelay.model_store import ModelStore

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
    source: Annotated[Path | None, typer.Argument(help="Folder or GGUF file. Default: the demo model, or the hub.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="What a GGUF file's weights are converted to.")] = "float32",
    link: Annotated[bool, typer.Option("--link", help="Link to the folder instead of copying it.")] = False,
) -> None:
    """Put a model into the store, and show its folder."""
    store = open_store(sources)
    with progress_bar() as progress:
        if source is not None:
            folder = store.add_model(name, source, dtype=dtype, link=link, progress=progress)
        else:
            folder = ensure_model(store, name, progress)
    print(folder)


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
    """The store that the settings name.

    Raises:
        ConfigError: a setting is wrong.
    """
    return _store_of(sources.load("models", EngineSettings))


def prepare_models(engines: Iterable[EngineSettings]) -> None:
    """Makes the engines' models ready under a progress bar, before any process waits for them.

    Raises:
        ModelLoadError: there is no such model, or it cannot be made.
    """
    with progress_bar() as progress:
        for settings in {(engine.model, engine.model_dir): engine for engine in engines}.values():
            ensure_model(_store_of(settings), settings.model, progress)


def _store_of(settings: EngineSettings) -> "ModelStore":
    from kvrelay.model_store import ModelStore, default_model_dir

    return ModelStore(Path(settings.model_dir).expanduser() if settings.model_dir else default_model_dir(os.environ))


def ensure_model(store: "ModelStore", name: str, progress: "Progress") -> Path:
    """A model's folder; the demo model is made on first use.

    Raises:
        ModelLoadError: there is no such model, or it cannot be made.
    """
    from kvrelay.model_store import DEMO_MODEL

    return store.ensure_demo_model(progress) if name == DEMO_MODEL else store.resolve(name, progress)


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """A bar on standard error, which appears with the first report and is gone at the end."""
    from rich.progress import Progress as Bar

    bar = Bar(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task("", total=1.0)
    stages: set[str] = set()

    def report(stage: str, fraction: float) -> None:
        if bar.disable and stage not in stages:
            print_note(stage)
        stages.add(stage)
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
                }
            )
        return
    from rich.table import Table

    table = Table(title=f"Models in {store.root}", title_justify="left")
    for column in ("name", "architecture", "dtype", "size", "folder"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for model in found:
        table.add_row(model.name, model.architecture, model.dtype, f"{model.size_bytes / _MIB:,.0f} MiB", str(model.path))
    console().print(table)
