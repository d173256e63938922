"""Settings: where values come from, which one wins, and what a wrong one says."""

from pathlib import Path
from typing import Any

import pytest

from kvrelay.config.base import Settings
from kvrelay.config.settings import (
    ClientSettings,
    DecodeSettings,
    GatewaySettings,
    PrefillSettings,
    ServerSettings,
)
from kvrelay.config.sources import SECTIONS, environment_for, read_sources, setting_fields
from kvrelay.errors import ConfigError


def write_config(folder: Path, text: str) -> str:
    path = folder / "kvrelay.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_hold_when_nothing_was_said() -> None:
    assert read_sources({}, environment={}).load("decode", DecodeSettings) == DecodeSettings()


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    config = write_config(tmp_path, "host: file\nport: 1\nlog_level: error\n")
    sources = read_sources({"host": "flag"}, config, {"KVRELAY_HOST": "environment", "KVRELAY_PORT": "2"})
    server = sources.load("gateway", GatewaySettings).server
    assert (server.host, server.port, server.log_level) == ("flag", 2, "error")


def test_a_roles_section_of_the_file_wins_over_its_top_level(tmp_path: Path) -> None:
    config = write_config(tmp_path, "kv_cache_mib: 100\nblock_size: 8\ndecode:\n  kv_cache_mib: 200\n")
    sources = read_sources({}, config, {})
    prefill, decode = sources.load("prefill", PrefillSettings), sources.load("decode", DecodeSettings)
    assert (prefill.engine.kv_cache_mib, decode.engine.kv_cache_mib) == (100, 200)
    assert prefill.engine.block_size == decode.engine.block_size == 8


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    config = write_config(tmp_path, "client: {gateway: 'elsewhere:1'}\n")
    sources = read_sources({}, environment={"KVRELAY_CONFIG": config})
    assert sources.load("client", ClientSettings).gateway == "elsewhere:1"


def test_an_empty_variable_counts_as_absent() -> None:
    sources = read_sources({}, environment={"KVRELAY_REDIS_URL": "", "KVRELAY_PORT": ""})
    assert sources.load("gateway", GatewaySettings) == GatewaySettings()


def test_a_section_keeps_the_defaults_of_its_role() -> None:
    settings = read_sources({"host": "0.0.0.0"}, environment={}).load("gateway", GatewaySettings)
    assert settings.server.port == GatewaySettings().server.port != 0


@pytest.mark.parametrize(
    ("flags", "environment", "text", "expected"),
    [
        ({"port": "70000"}, {}, "", "port is '70000' (flag --port): input should be less than or equal to 65535"),
        ({"port": "x"}, {}, "", "port is 'x' (flag --port)"),
        ({}, {"KVRELAY_LOG_LEVEL": "loud"}, "", "log_level is 'loud' (environment KVRELAY_LOG_LEVEL)"),
        ({}, {}, "lease_ms: 1", "lease_ms is 1 (file {path} key lease_ms)"),
        ({}, {}, "gateway:\n  lease_ms: soon", "lease_ms is 'soon' (file {path} key gateway.lease_ms)"),
        ({}, {}, "port: on", "port is True (file {path} key port): a int is needed"),
        ({}, {}, "kv-cache-mib: 1", "key kv-cache-mib is no setting; did you mean kv_cache_mib?"),
        ({}, {}, "prefil:\n  host: a", "key prefil is no setting; did you mean prefill?"),
        ({}, {}, "gateway:\n  kv_cache_mib: 1", "key gateway.kv_cache_mib is no setting"),
        ({}, {}, "gateway: 5", "key gateway must hold a mapping of settings, not 5"),
        ({}, {}, "- a", "must hold a mapping of settings, not a list"),
        ({}, {}, "port: 1\nport: 2", "key port is given twice"),
        ({}, {}, "port: [", "cannot read the file {path} (flag --config)"),
    ],
)
def test_a_wrong_value_names_itself_and_its_source(
    tmp_path: Path, flags: dict[str, str], environment: dict[str, str], text: str, expected: str
) -> None:
    config = write_config(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_sources(flags, config, environment).load("gateway", GatewaySettings)
    assert expected.format(path=config) in caught.value.message


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the file /nowhere\.yaml \(environment KVRELAY_CONFIG\)"):
        read_sources({}, environment={"KVRELAY_CONFIG": "/nowhere.yaml"})


def test_every_setting_is_described_and_none_is_declared_twice_in_a_process() -> None:
    for settings_class in SECTIONS.values():
        assert all(setting.info.description for setting in setting_fields(settings_class).values())

    class Doubled(Settings):
        server: ServerSettings = ServerSettings()
        host: str = "again"

    with pytest.raises(AssertionError, match="host"):
        setting_fields(Doubled)


def test_a_child_finds_exactly_the_settings_it_was_given() -> None:
    settings = DecodeSettings()
    settings = settings.model_copy(
        update={
            "server": settings.server.model_copy(update={"redis_url": "redis://h:1/0", "host": "::1"}),
            "engine": settings.engine.model_copy(update={"prefix_cache": False, "num_threads": 3, "kv_cache_mib": 7}),
        }
    )
    environment = environment_for(settings, {"PATH": "/bin", "KVRELAY_PORT": "1", "KVRELAY_CONFIG": "/nowhere.yaml"})
    assert environment["PATH"] == "/bin"
    assert read_sources({}, environment=environment).load("decode", DecodeSettings) == settings


@pytest.mark.parametrize(
    ("host", "flags", "environment", "taken"),
    [
        ("127.0.0.1", {}, {}, True),
        ("127.9.9.9", {}, {}, True),
        ("localhost", {}, {}, True),
        ("::1", {}, {}, True),
        ("0.0.0.0", {}, {}, False),
        ("::", {}, {}, False),
        ("192.0.2.7", {}, {}, False),
        ("0.0.0.0", {"try_box": True}, {}, True),
        ("127.0.0.1", {"try_box": False}, {}, False),
        ("127.0.0.1", {}, {"KVRELAY_TRY_BOX": "off"}, False),
    ],
)
def test_prompts_are_typed_on_the_page_where_only_this_machine_reaches_it_or_where_it_was_said(
    host: str, flags: dict[str, Any], environment: dict[str, str], taken: bool
) -> None:
    settings = read_sources({"host": host} | flags, environment=environment).load("gateway", GatewaySettings)
    assert settings.takes_typed_prompts is taken


def test_a_switch_whose_default_depends_is_a_switch_too(tmp_path: Path) -> None:
    assert setting_fields(GatewaySettings)["try_box"].is_switch
    path = write_config(tmp_path, "gateway: {try_box: no}\n")
    assert read_sources({}, path, environment={}).load("gateway", GatewaySettings).requests.try_box is False


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        (ServerSettings(host="10.0.0.7"), "10.0.0.7:50051"),
        (ServerSettings(host="0.0.0.0"), "10.0.0.8:50051"),
        (ServerSettings(host="[::]"), "10.0.0.8:50051"),
        (ServerSettings(host="0.0.0.0", advertise_address="decode.example:1"), "decode.example:1"),
    ],
)
def test_the_address_that_others_reach_a_process_by(
    settings: ServerSettings, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay.config.settings.own_address", lambda redis_url: "10.0.0.8")
    assert settings.address_of(50051) == address
