"""Each role on each kind of host: it starts, or refuses because strangers would be a danger."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from kvrelay.client import AsyncClient
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import DecodeSettings, GatewaySettings, OpenAISettings, PrefillSettings, ServerSettings
from kvrelay.errors import ConfigError, StartupError
from kvrelay.network import exposure, listening, rpc
from kvrelay.network.exposure import exposure_of, reminding, showing_health
from kvrelay.openai_frontend import main as openai_main
from kvrelay.openai_frontend.main import check_host
from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ALL_RIGHTS, PLAIN_KEYS, ProcessSecurity
from kvrelay.testing.waiting import wait_until
from kvrelay.worker import process

LOOPBACK = ("127.0.0.1", "::1", "localhost", "127.1.2.3")
EXPOSED = ("0.0.0.0", "::", "10.1.2.3", "192.0.2.1", "no-such-host.invalid")
CREDENTIALS = ("nothing", "keys", "certificates")


@pytest.fixture
def security_with(tmp_path: Path) -> Callable[[str, Role], SecuritySettings]:
    make_certificates(tmp_path, CertificatePlan("kvrelay.local"))
    (tmp_path / "keys.yaml").write_text("keys: []\n")

    def settings(credentials: str, role: Role) -> SecuritySettings:
        if credentials == "keys":
            return SecuritySettings(keys_file=str(tmp_path / "keys.yaml"))
        if credentials == "certificates":
            files = {"tls_cert": f"{role}.pem", "tls_key": f"{role}.key", "tls_ca": "ca.pem"}
            return SecuritySettings(**{name: str(tmp_path / file) for name, file in files.items()})
        return SecuritySettings()

    return settings


def start(role: Role, host: str, security: SecuritySettings) -> str | None:
    """Returns the danger. Raises StartupError where the process refuses."""
    server = ServerSettings(host=host)
    known = ProcessSecurity.of(security, role)
    if role is Role.GATEWAY:
        from gateway.main import exposure_of_gateway

        return exposure_of_gateway(known, GatewaySettings(server=server, security=security))
    kind = PrefillSettings if role is Role.PREFILL else DecodeSettings
    return process.exposure_of_worker(known, kind(server=server, security=security))


@pytest.mark.parametrize("credentials", CREDENTIALS)
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("host", [*LOOPBACK, *EXPOSED])
def test_a_process_refuses_hosts_where_strangers_would_be_a_danger(
    role: Role, host: str, credentials: str, security_with: Callable[[str, Role], SecuritySettings]
) -> None:
    security = security_with(credentials, role)
    if host in LOOPBACK or credentials == "certificates":
        assert start(role, host, security) is None
        return
    danger = PLAIN_KEYS if credentials == "keys" and role is Role.GATEWAY else ALL_RIGHTS
    with pytest.raises(StartupError, match=rf"{danger}.*--tls-cert.*--insecure"):
        start(role, host, security)
    assert start(role, host, security.model_copy(update={"insecure": True})) == danger


def test_a_name_is_local_only_if_all_its_addresses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "10.1.2.3")]
    monkeypatch.setattr(listening, "addresses_of", lambda host: both)
    assert not listening.is_loopback("both.example")
    monkeypatch.setattr(listening, "addresses_of", lambda host: both[:1])
    assert listening.is_loopback("here.example")


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.PREFILL, Role.DECODE])
def test_a_key_of_one_machine_protects_from_no_other(role: Role, tmp_path: Path) -> None:
    """It crosses a network in plain text."""
    path = tmp_path / "cluster.key"
    path.touch(0o600)
    path.write_text("k" * 64)
    security = SecuritySettings(cluster_key_file=str(path))
    with pytest.raises(StartupError, match="has all rights"):
        start(role, "10.1.2.3", security)
    assert start(role, "127.0.0.1", security) is None


async def test_a_process_looks_at_its_host_before_anything_else_starts() -> None:
    from gateway.main import serve

    nothing: Any = None
    server = ServerSettings(host="0.0.0.0")
    with pytest.raises(StartupError, match="has all rights"):
        await serve(GatewaySettings(server=server), asyncio.Event())
    for role, settings in ((Role.PREFILL, PrefillSettings), (Role.DECODE, DecodeSettings)):
        security = ProcessSecurity.of(SecuritySettings(), role)
        with pytest.raises(StartupError, match="has all rights"):
            await process.serve_worker(nothing, nothing, settings(server=server), security, asyncio.Event())
    with pytest.raises(ConfigError, match="everybody who reaches the port"):
        await openai_main.serve(OpenAISettings(host="0.0.0.0"))


@pytest.mark.parametrize("host", [*LOOPBACK, *EXPOSED])
def test_a_front_refuses_hosts_where_everybody_may_ask(host: str) -> None:
    settings = OpenAISettings(host=host)
    if host in LOOPBACK:
        check_host(settings, [])
        return
    with pytest.raises(ConfigError, match="--insecure"):
        check_host(settings, [])
    check_host(settings.model_copy(update={"local_clients": True}), [])
    check_host(settings.model_copy(update={"security": SecuritySettings(insecure=True)}), [])


async def test_an_exposed_process_says_so_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposure, "REMINDER_INTERVAL_S", 0.0)
    with structlog.testing.capture_logs() as logs:
        async with reminding("keys come in plain text", "10.1.2.3"):
            await wait_until(lambda: len(logs) >= 3, "it says so three times")
    said = {(line["log_level"], line["host"], line["event"]) for line in logs}
    assert said == {("warning", "10.1.2.3", "keys come in plain text (--insecure)")}


async def test_a_protected_process_says_nothing() -> None:
    with structlog.testing.capture_logs() as logs:
        async with reminding(None, "127.0.0.1"):
            await asyncio.sleep(0)
    assert logs == []


@pytest.mark.parametrize("exposure", ["danger", None])
async def test_health_tells_of_the_danger(exposure: str | None) -> None:
    server = rpc.create_server()
    bound = rpc.bind_server(server, "127.0.0.1", 0, ())
    await bound.set_serving(True)
    await server.start()
    try:
        async with showing_health(bound, exposure, list), AsyncClient(f"127.0.0.1:{bound.port}") as client:
            health = await client.health()
        assert (health.serving, health.insecure) == (True, exposure is not None)
    finally:
        await server.stop(None)


async def test_health_tells_while_changed_credentials_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposure, "LOOK_INTERVAL_S", 0.01)
    server, problems = rpc.create_server(), list[str]()
    bound = rpc.bind_server(server, "127.0.0.1", 0, ())
    await bound.set_serving(True)
    await server.start()
    try:
        async with showing_health(bound, None, lambda: problems), AsyncClient(f"127.0.0.1:{bound.port}") as client:

            async def is_broken() -> bool:
                return (await client.health()).broken_credentials

            assert not await is_broken()
            problems.append("the keys file cannot be read")
            await wait_until(is_broken, "health tells")
            problems.clear()

            async def is_mended() -> bool:
                return not await is_broken()

            await wait_until(is_mended, "health tells of the end")
            assert not (await client.health()).insecure
    finally:
        await server.stop(None)


def test_only_the_owner_of_a_process_can_expose_it() -> None:
    with pytest.raises(StartupError, match="give certificates"):
        exposure_of("10.1.2.3", "danger", insecure=False)
