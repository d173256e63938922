"""Reads settings: flags before environment before file before defaults.

    flag          --kv-cache-mib 512           --prefix-cache / --no-prefix-cache
    environment   KVRELAY_KV_CACHE_MIB=512     an empty variable counts as absent
    file          --config FILE or KVRELAY_CONFIG: YAML, top level for all roles, sections for one

Only this module reads KVRELAY_* variables.
"""

import os
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from kvrelay.config.base import Settings
from kvrelay.config.foreign_variables import is_service_link, nearest_name, notes_on_variables
from kvrelay.config.settings import (
    ClientSettings,
    ClusterSettings,
    DecodeSettings,
    GatewaySettings,
    OpenAISettings,
    PrefillSettings,
)
from kvrelay.errors import ConfigError

ENVIRONMENT_PREFIX = "KVRELAY_"
CONFIG_VARIABLE = "KVRELAY_CONFIG"

SECTIONS: dict[str, type[Settings]] = {
    "gateway": GatewaySettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
    "openai": OpenAISettings,
    "cluster": ClusterSettings,
    "client": ClientSettings,
}
"""Sections of the file, each for one kind of process."""

SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True, slots=True)
class SettingField:
    """`path` has the names of the attributes that lead to the setting."""

    name: str
    path: tuple[str, ...]
    info: FieldInfo
    default: Any

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def other_flags(self) -> tuple[str, ...]:
        extra = self.info.json_schema_extra
        return tuple(extra["flags"]) if isinstance(extra, dict) and "flags" in extra else ()  # type: ignore[arg-type]

    @property
    def panel(self) -> str | None:
        """Its heading in --help; None for the general one."""
        extra = self.info.json_schema_extra
        if isinstance(extra, dict) and "panel" in extra:
            return str(extra["panel"])
        return f"{self.path[0].capitalize()} settings" if len(self.path) > 1 else None

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        return self.info.annotation in (bool, bool | None)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words; empty when the type does not list them."""
        if typing.get_origin(self.info.annotation) is typing.Literal:
            return typing.get_args(self.info.annotation)
        return ()

    @property
    def type_name(self) -> str:
        """For help texts: int, float or text."""
        kinds = {self.info.annotation, *typing.get_args(self.info.annotation)}
        return next((kind.__name__ for kind in (int, float) if kind in kinds), "text")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """`name` is the path that the user gave."""

    name: str
    top: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SettingsSources:
    flags: Mapping[str, Any]
    environment: Mapping[str, str]
    file: ConfigFile | None
    notes: tuple[str, ...] = ()
    """A sentence for each ignored variable."""

    def load(self, section: str, settings_class: type[SettingsT]) -> SettingsT:
        """Raises ConfigError, which names setting, value and source."""
        fields = setting_fields(settings_class)
        values: dict[str, Any] = settings_class().model_dump()
        origins: dict[str, str] = {}
        for setting in fields.values():
            found = self._find(section, setting)
            if found is not None:
                origins[setting.name], value = found
                _check_yaml_type(setting, value, origins[setting.name])
                _set(values, setting.path, value)
        try:
            return settings_class.model_validate(values)
        except ValidationError as error:
            raise _config_error(error, origins) from None

    def print_notes(self) -> None:
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)

    def _find(self, section: str, setting: SettingField) -> tuple[str, Any] | None:
        if self.flags.get(setting.name) is not None:
            return f"flag {setting.flag}", self.flags[setting.name]
        if self.environment.get(setting.variable):
            return f"environment {setting.variable}", self.environment[setting.variable]
        if self.file is None:
            return None
        in_section = self.file.sections.get(section, {})
        if setting.name in in_section:
            return f"file {self.file.name} key {section}.{setting.name}", in_section[setting.name]
        if setting.name in self.file.top:
            return f"file {self.file.name} key {setting.name}", self.file.top[setting.name]
        return None


def read_sources(
    flags: Mapping[str, Any], config_path: str | None = None, environment: Mapping[str, str] | None = None
) -> SettingsSources:
    """Flags are by flat setting name. The default of `config_path` is KVRELAY_CONFIG."""
    variables = os.environ if environment is None else environment
    found = {name: value for name, value in variables.items() if name.startswith(ENVIRONMENT_PREFIX)}
    known = {setting.variable for setting in _all_fields()} | {CONFIG_VARIABLE}
    notes = notes_on_variables(found, known)
    ours = {name: value for name, value in found.items() if name in known and not is_service_link(name, value)}
    path = config_path or ours.get(CONFIG_VARIABLE)
    origin = "flag --config" if config_path else f"environment {CONFIG_VARIABLE}"
    return SettingsSources(flags, ours, read_config_file(path, origin) if path else None, notes)


def environment_for(settings: Settings, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """A child's environment with exactly these settings, and no KVRELAY_* of this process."""
    variables = os.environ if base is None else base
    result = {name: value for name, value in variables.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    for setting in setting_fields(type(settings)).values():
        value = _get(settings, setting.path)
        if value is not None and value != setting.default:
            result[setting.variable] = str(value)
    return result


def setting_fields(settings_class: type[Settings]) -> dict[str, SettingField]:
    """By flat name, in the order of declaration."""
    fields: dict[str, SettingField] = {}
    for setting in _walk(settings_class(), ()):
        assert setting.name not in fields, f"{setting.name} is declared twice in {settings_class.__name__}"
        fields[setting.name] = setting
    return fields


def read_config_file(path: str, origin: str) -> ConfigFile:
    """Raises ConfigError for an unreadable file, and for unknown keys."""
    try:
        document = yaml.load(Path(path).read_text("utf-8"), _UniqueKeyLoader)  # noqa: S506  # it is a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the file {path} ({origin}): {' '.join(str(error).split())}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"the file {path} ({origin}) must hold a mapping of settings, not a {type(document).__name__}"
        )
    sections = {key: value or {} for key, value in document.items() if key in SECTIONS}
    top = {key: value for key, value in document.items() if key not in SECTIONS}
    _check_keys(path, "", top, {setting.name for setting in _all_fields()} | SECTIONS.keys())
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ConfigError(f"file {path} key {section} must hold a mapping of settings, not {values!r}")
        _check_keys(path, f"{section}.", values, setting_fields(SECTIONS[section]).keys())
    return ConfigFile(path, top, sections)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses repeated keys. YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = {key for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"key {min(repeated)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _walk(settings: Settings, path: tuple[str, ...]) -> Iterator[SettingField]:
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _walk(value, (*path, name))
        else:
            yield SettingField(name, (*path, name), info, value)


def _all_fields() -> Iterator[SettingField]:
    for settings_class in SECTIONS.values():
        yield from setting_fields(settings_class).values()


def _check_keys(path: str, prefix: str, values: Mapping[Any, Any], known: Iterable[str]) -> None:
    names = set(known)
    for key in values:
        if key not in names:
            raise ConfigError(f"file {path} key {prefix}{key} is no setting{_suggestion(str(key), names)}")


def _check_yaml_type(setting: SettingField, value: Any, origin: str) -> None:
    # YAML reads `yes` and `on` as true, which pydantic takes for the number 1.
    if isinstance(value, bool) and not setting.is_switch:
        raise ConfigError(f"{setting.name} is {value!r} ({origin}): a {setting.type_name} is needed")


def _suggestion(name: str, known: Iterable[str]) -> str:
    nearest = nearest_name(name, known)
    return f"; did you mean {nearest}?" if nearest else ""


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    for parent in parents:
        values = values[parent]
    values[last] = value


def _get(settings: Settings, path: tuple[str, ...]) -> Any:
    value: Any = settings
    for name in path:
        value = getattr(value, name)
    return value


def _config_error(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    details = error.errors(include_url=False)
    lines = []
    for detail in details:
        name = str(detail["loc"][-1]) if detail["loc"] else "settings"
        message = detail["msg"].removeprefix("Value error, ")
        problem = message if detail["type"] == "value_error" else message[0].lower() + message[1:]
        lines.append(f"{name} is {detail['input']!r} ({origins.get(name, 'default')}): {problem}")
    return ConfigError("; ".join(lines))
