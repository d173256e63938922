"""Where settings come from: flags before the environment before a file before defaults. The only reader of KVRELAY_* variables.

    flag          --kv-cache-mib 512           --prefix-cache / --no-prefix-cache
    environment   KVRELAY_KV_CACHE_MIB=512     an empty variable counts as absent
    file          --config FILE or KVRELAY_CONFIG: YAML, fields at the top level for every role, in a role's section for that role

        redis_url: redis://10.0.0.5:6379/0
        kv_cache_mib: 2048
        decode:
          kv_cache_mib: 8192

Every name is spelled once, in `kvrelay.config`; this module knows the shapes of settings and none of their meanings.
"""

import difflib
import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from kvrelay.config import ClientSettings, ClusterSettings, DecodeSettings, GatewaySettings, PrefillSettings, Settings
from kvrelay.errors import ConfigError

ENVIRONMENT_PREFIX = "KVRELAY_"
CONFIG_VARIABLE = "KVRELAY_CONFIG"

SECTIONS: dict[str, type[Settings]] = {
    "gateway": GatewaySettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
    "cluster": ClusterSettings,
    "client": ClientSettings,
}
"""Section of the file that holds for one kind of process only."""

SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True, slots=True)
class SettingField:
    """One setting: its flat name, the path of attributes that leads to it, its declaration and its default."""

    name: str
    path: tuple[str, ...]
    info: FieldInfo
    default: Any

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def other_flags(self) -> tuple[str, ...]:
        """Further spellings of the flag."""
        extra = self.info.json_schema_extra
        return tuple(extra["flags"]) if isinstance(extra, dict) and "flags" in extra else ()  # type: ignore[arg-type]

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        return self.info.annotation is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, or nothing when any value of the type may do."""
        if typing.get_origin(self.info.annotation) is typing.Literal:
            return typing.get_args(self.info.annotation)
        return ()

    @property
    def type_name(self) -> str:
        """Name of the value's type for help texts: int, float or text."""
        kinds = {self.info.annotation, *typing.get_args(self.info.annotation)}
        return next((kind.__name__ for kind in (int, float) if kind in kinds), "text")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A settings file as parsed; `name` is how the user called it."""

    name: str
    top: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SettingsSources:
    """Everything that was said about settings, checked for names that do not exist."""

    flags: Mapping[str, Any]
    environment: Mapping[str, str]
    file: ConfigFile | None

    def load(self, section: str, settings_class: type[SettingsT]) -> SettingsT:
        """The settings of one kind of process.

        Raises:
            ConfigError: a value is wrong; names the setting, the value and where it came from.
        """
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
    """Collects the sources.

    Args:
        flags: flat setting name to its value as given; None means not given.
        config_path: the file named by --config; else KVRELAY_CONFIG names it, else there is none.
        environment: default: the process's.

    Raises:
        ConfigError: the file cannot be read, or it or the environment names a setting that does not exist.
    """
    variables = os.environ if environment is None else environment
    ours = {name: value for name, value in variables.items() if name.startswith(ENVIRONMENT_PREFIX)}
    known = {setting.variable for setting in _all_fields()} | {CONFIG_VARIABLE}
    for name in ours.keys() - known:
        raise ConfigError(f"environment {name} is no setting{_suggestion(name, known)}")
    path = config_path or ours.get(CONFIG_VARIABLE)
    origin = "flag --config" if config_path else f"environment {CONFIG_VARIABLE}"
    return SettingsSources(flags, ours, read_config_file(path, origin) if path else None)


def environment_for(settings: Settings, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment in which a process finds exactly these settings, and no KVRELAY_* of this process's own."""
    variables = os.environ if base is None else base
    result = {name: value for name, value in variables.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    for setting in setting_fields(type(settings)).values():
        value = _get(settings, setting.path)
        if value is not None and value != setting.default:
            result[setting.variable] = str(value)
    return result


def setting_fields(settings_class: type[Settings]) -> dict[str, SettingField]:
    """Flat name to setting, in the order of declaration."""
    fields: dict[str, SettingField] = {}
    for setting in _walk(settings_class(), ()):
        assert setting.name not in fields, f"{setting.name} is declared twice in {settings_class.__name__}"
        fields[setting.name] = setting
    return fields


def read_config_file(path: str, origin: str) -> ConfigFile:
    """Reads a YAML file of settings and checks its keys.

    Raises:
        ConfigError: it cannot be read, is no YAML mapping, or has keys that are no settings.
    """
    try:
        document = yaml.load(Path(path).read_text("utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the file {path} ({origin}): {' '.join(str(error).split())}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(f"the file {path} ({origin}) must hold a mapping of settings, not a {type(document).__name__}")
    sections = {key: value or {} for key, value in document.items() if key in SECTIONS}
    top = {key: value for key, value in document.items() if key not in SECTIONS}
    _check_keys(path, "", top, {setting.name for setting in _all_fields()} | SECTIONS.keys())
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ConfigError(f"file {path} key {section} must hold a mapping of settings, not {values!r}")
        _check_keys(path, f"{section}.", values, setting_fields(SECTIONS[section]).keys())
    return ConfigFile(path, top, sections)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key that is given twice, where YAML would keep the last one silently."""

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
    # YAML reads `yes` and `on` as true, which pydantic would take for the number 1.
    if isinstance(value, bool) and not setting.is_switch:
        raise ConfigError(f"{setting.name} is {value!r} ({origin}): a {setting.type_name} is needed")


def _suggestion(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


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
        problem = detail["msg"][0].lower() + detail["msg"][1:]
        lines.append(f"{name} is {detail['input']!r} ({origins.get(name, 'default')}): {problem}")
    return ConfigError("; ".join(lines))
