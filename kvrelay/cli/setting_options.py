"""Turns settings into command line options, so that each is declared once."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any

import typer

from kvrelay.config.base import Settings
from kvrelay.config.sources import SettingField, read_sources, setting_fields

_CONFIG = "config"


def takes_settings(
    *settings_classes: type[Settings], only: Collection[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command whose first parameter is the SettingsSources.

    The first class that has a field shows its default. `only` names fields.
    """
    fields: dict[str, SettingField] = {}
    for settings_class in settings_classes:
        for name, setting in setting_fields(settings_class).items():
            if only is None or name in only:
                fields.setdefault(name, setting)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_settings(**arguments: Any) -> None:
            flags = {name: arguments.pop(name) for name in fields}
            sources = read_sources(flags, arguments.pop(_CONFIG))
            sources.print_notes()
            command(sources, **arguments)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*own, _config_parameter(), *map(_parameter, fields.values())]
        keyword_only = (parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters)
        with_settings.__signature__ = inspect.Signature(list(keyword_only))  # type: ignore[attr-defined]
        with_settings.__annotations__ = {}
        return with_settings

    return decorate


def _config_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--config", metavar="FILE", help="YAML file with settings. Also KVRELAY_CONFIG.", show_default=False
    )
    return _keyword(_CONFIG, Annotated[str | None, option])


def _parameter(setting: SettingField) -> inspect.Parameter:
    return _keyword(setting.name, Annotated[bool | None if setting.is_switch else str | None, _option(setting)])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(setting: SettingField) -> Any:
    choices = f"One of {', '.join(setting.choices)}." if setting.choices else ""
    default = "" if setting.default is None else f"Default: {_in_words(setting.default)}."
    return typer.Option(
        *_declarations(setting),
        # Short, because 80 columns must have room for the options' names.
        metavar=" " if setting.is_switch else "NAME" if setting.choices else setting.type_name.upper(),
        help=" ".join(part for part in (setting.info.description, choices, default) if part),
        show_default=False,
        rich_help_panel=setting.panel,
    )


def _in_words(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _declarations(setting: SettingField) -> Iterator[str]:
    if setting.is_switch:
        yield f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
    else:
        yield setting.flag
        yield from setting.other_flags
