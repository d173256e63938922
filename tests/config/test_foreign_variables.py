"""Variables named KVRELAY_* that are no settings: others' are ignored, mistakes are said."""

from pathlib import Path

import pytest

from kvrelay.config.settings import ClientSettings, GatewaySettings
from kvrelay.config.sources import SettingsSources, read_config_file, read_sources
from kvrelay.errors import ConfigError


def service_links(service: str, port: int, port_name: str) -> dict[str, str]:
    """What Kubernetes puts into every pod of a namespace that has the Service."""
    name = service.upper().replace("-", "_")
    port_prefix = f"{name}_PORT_{port}_TCP"
    return {
        f"{name}_SERVICE_HOST": "10.96.0.17",
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_{port_name.upper().replace('-', '_')}": str(port),
        f"{name}_PORT": f"tcp://10.96.0.17:{port}",
        port_prefix: f"tcp://10.96.0.17:{port}",
        f"{port_prefix}_PROTO": "tcp",
        f"{port_prefix}_PORT": str(port),
        f"{port_prefix}_ADDR": "10.96.0.17",
    }


def sources_of(environment: dict[str, str]) -> SettingsSources:
    return read_sources({}, environment=environment)


@pytest.mark.parametrize("service", ["kvrelay", "kvrelay-gateway", "kvrelay-redis", "kvrelay-http", "kvrelay-openai"])
def test_links_to_a_service_of_any_name_change_no_setting(service: str) -> None:
    sources = sources_of(service_links(service, 50050, "grpc-web"))
    assert sources.load("gateway", GatewaySettings) == GatewaySettings()
    assert sources.load("client", ClientSettings) == ClientSettings()


@pytest.mark.parametrize("service", ["kvrelay-gateway", "kvrelay-redis"])
def test_links_that_bear_no_settings_name_are_not_mentioned(service: str) -> None:
    assert sources_of(service_links(service, 6379, "redis")).notes == ()


@pytest.mark.parametrize(("service", "variable"), [("kvrelay", "KVRELAY_PORT"), ("kvrelay-http", "KVRELAY_HTTP_PORT")])
def test_a_link_that_bears_a_settings_name_is_mentioned_once_with_what_keeps_it_away(
    service: str, variable: str
) -> None:
    (note,) = sources_of(service_links(service, 50050, "grpc")).notes
    assert note.startswith(f"environment {variable}=tcp://10.96.0.17:50050 is a link to a Kubernetes Service")
    assert "enableServiceLinks: false" in note


def test_a_port_that_a_person_sets_beside_links_holds() -> None:
    environment = {**service_links("kvrelay", 50050, "grpc"), "KVRELAY_PORT": "50123"}
    assert sources_of(environment).load("gateway", GatewaySettings).server.port == 50123


@pytest.mark.parametrize("value", ["http://10.0.0.1:80", "tcp:50050", "fifty"])
def test_a_port_that_is_neither_a_number_nor_a_link_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="KVRELAY_PORT"):
        sources_of({"KVRELAY_PORT": value}).load("gateway", GatewaySettings)


@pytest.mark.parametrize("variable", ["KVRELAY_GRAFANA_PORT", "KVRELAY_PROMETHEUS_PORT", "KVRELAY_OPENAI_PORT"])
def test_variables_of_the_compose_file_are_not_mentioned(variable: str) -> None:
    assert sources_of({variable: "3001"}).notes == ()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("KVRELAY_KV_CACHE_MB", "KVRELAY_KV_CACHE_MIB"),
        ("KVRELAY_PROT", "KVRELAY_PORT"),
        ("KVRELAY_MODLE", "KVRELAY_MODEL"),
        ("KVRELAY_THREADS", "KVRELAY_NUM_THREADS"),
    ],
)
def test_a_mistyped_variable_is_ignored_and_said_with_what_was_meant(variable: str, meant: str) -> None:
    sources = sources_of({variable: "1"})
    assert sources.notes == (f"environment {variable} is no setting: it is ignored; did you mean {meant}?",)
    assert sources.load("gateway", GatewaySettings) == GatewaySettings()


@pytest.mark.parametrize("variable", ["KVRELAY_FOO", "KVRELAY_TYPO_KEY", "KVRELAY_X"])
def test_nothing_is_suggested_for_a_variable_that_resembles_no_setting(variable: str) -> None:
    assert sources_of({variable: "1"}).notes == (f"environment {variable} is no setting: it is ignored",)


def test_notes_are_printed_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    sources_of({"KVRELAY_FOO": "1"}).print_notes()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "note: environment KVRELAY_FOO is no setting: it is ignored\n")


def test_nothing_is_suggested_for_a_key_of_the_file_that_resembles_no_setting(tmp_path: Path) -> None:
    path = f"{tmp_path}/kvrelay.yaml"
    with open(path, "w", encoding="utf-8") as file:
        file.write("typo_key: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_config_file(path, "flag --config")
    assert caught.value.message == f"file {path} key typo_key is no setting"
