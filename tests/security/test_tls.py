"""Who gets through a handshake, and which certificate counts after the files have changed."""

import dataclasses
import datetime
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvrelay.config.security_settings import SecuritySettings
from kvrelay.errors import ConfigError
from kvrelay.network.rpc import bind_server, create_channel, create_server
from kvrelay.security import certificates
from kvrelay.security.certificates import CertificatePlan
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.security.role_names import peer_roles

DOMAIN = "cluster.example"
PLAN = CertificatePlan(DOMAIN)
TIMEOUT_S = 20.0


def settings_of(folder: Path, role: str, **changes: Any) -> SecuritySettings:
    files = {"tls_cert": folder / f"{role}.pem", "tls_key": folder / f"{role}.key", "tls_ca": folder / "ca.pem"}
    values = {name: str(path) for name, path in files.items()}
    return SecuritySettings(**{**values, "trust_domain": DOMAIN, **changes})


def security_of(folder: Path, role: str, **changes: Any) -> ProcessSecurity:
    return ProcessSecurity.of(settings_of(folder, role, **changes), Role(role))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "certificates"
    certificates.make_certificates(made, PLAN)
    return made


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    made = tmp_path / "other"
    certificates.make_certificates(made, PLAN)
    return made


@dataclasses.dataclass
class Server:
    address: str
    seen: list[Any]
    """Auth contexts of calls."""

    @property
    def roles(self) -> list[frozenset[Role]]:
        return [peer_roles(context, DOMAIN) for context in self.seen]


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials | None) -> AsyncIterator[Server]:
    seen: list[Any] = []

    async def answer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        seen.append(context.auth_context())
        return b"answer"

    server = create_server()
    handlers: dict[str, Any] = {"Ask": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    bound = bind_server(server, "127.0.0.1", 0, (), credentials)
    await server.start()
    try:
        yield Server(f"127.0.0.1:{bound.port}", seen)
    finally:
        await server.stop(None)


async def ask(address: str, credentials: ChannelCredentials | None) -> grpc.StatusCode:
    async with create_channel(address, credentials=credentials) as channel:
        method: Any = channel.unary_unary("/test.Service/Ask")
        try:
            await method(b"", timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            return failure.code()
    return grpc.StatusCode.OK


async def test_a_worker_sees_the_role_of_a_caller(folder: Path) -> None:
    async with serving(security_of(folder, "decode").server_credentials()) as server:
        for role in ("prefill", "gateway"):
            assert await ask(server.address, security_of(folder, role).towards(Role.DECODE)) is grpc.StatusCode.OK
        assert server.roles == [{Role.PREFILL}, {Role.GATEWAY}]


def write_expired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30)
    monkeypatch.setattr(certificates, "CLOCK_DIFFERENCE", datetime.datetime.now(datetime.UTC) - past)
    plan = dataclasses.replace(PLAN, num_days=-1)
    certificates.renew_certificates(folder, plan)
    monkeypatch.undo()


def without_certificate(folder: Path) -> ChannelCredentials:
    tls = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    return ChannelCredentials(tls, f"decode.{DOMAIN}", b"")


def expired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ChannelCredentials:
    write_expired(folder, monkeypatch)
    pair = ((folder / "gateway.key").read_bytes(), (folder / "gateway.pem").read_bytes())
    return ChannelCredentials(
        grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *pair), f"decode.{DOMAIN}", b""
    )


def of_another_ca(folder: Path, other: Path) -> ChannelCredentials:
    """Trusts the server, and shows a certificate of a CA that the server does not know."""
    pair = ((other / "gateway.key").read_bytes(), (other / "gateway.pem").read_bytes())
    return ChannelCredentials(
        grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *pair), f"decode.{DOMAIN}", b""
    )


@pytest.mark.parametrize("who", ["plain text", "no certificate", "another CA", "expired"])
async def test_a_stranger_is_refused_in_the_handshake(
    folder: Path, other_folder: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: dict[str, Callable[[], ChannelCredentials | None]] = {
        "plain text": lambda: None,
        "no certificate": lambda: without_certificate(folder),
        "another CA": lambda: of_another_ca(folder, other_folder),
        "expired": lambda: expired(folder, monkeypatch),
    }
    server_credentials = security_of(folder, "decode").server_credentials()
    async with serving(server_credentials) as server:
        assert await ask(server.address, security_of(folder, "gateway").towards(Role.DECODE)) is grpc.StatusCode.OK
        assert await ask(server.address, callers[who]()) is grpc.StatusCode.UNAVAILABLE
        assert len(server.seen) == 1


@pytest.mark.parametrize("poser", ["prefill", "front", "redis", "client"])
async def test_a_dialler_refuses_a_process_of_another_role(folder: Path, poser: str) -> None:
    pair = ((folder / f"{poser}.key").read_bytes(), (folder / f"{poser}.pem").read_bytes())
    async with serving(grpc.ssl_server_credentials([pair], (folder / "ca.pem").read_bytes(), True)) as server:
        assert await ask(server.address, security_of(folder, "gateway").towards(Role.DECODE)) is (
            grpc.StatusCode.UNAVAILABLE
        )
        assert server.seen == []


async def test_a_dialler_refuses_a_process_of_another_ca(folder: Path, other_folder: Path) -> None:
    async with serving(security_of(other_folder, "decode").server_credentials()) as server:
        code = await ask(server.address, security_of(folder, "gateway").towards(Role.DECODE))
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_gateway_with_keys_lets_clients_without_certificate_in_at_one_port_only(folder: Path) -> None:
    security = security_of(folder, "gateway", keys_file=str(keys_file(folder)))
    assert security.needs_peer_port
    towards = security_of(folder, "gateway").towards(Role.GATEWAY)
    client = dataclasses.replace(without_certificate(folder), server_name=None)
    async with serving(security.server_credentials()) as server:
        assert await ask(server.address, client) is grpc.StatusCode.OK
        assert await ask(server.address, towards) is grpc.StatusCode.OK
        assert server.roles == [frozenset(), frozenset()]
    async with serving(security.peer_credentials()) as server:
        assert await ask(server.address, client) is grpc.StatusCode.UNAVAILABLE
        assert await ask(server.address, towards) is grpc.StatusCode.OK
        assert server.roles == [{Role.GATEWAY}]


async def test_a_worker_with_keys_for_its_http_port_asks_for_certificates_all_the_same(folder: Path) -> None:
    security = security_of(folder, "decode", keys_file=str(keys_file(folder)))
    assert not security.needs_peer_port
    async with serving(security.server_credentials()) as server:
        assert await ask(server.address, without_certificate(folder)) is grpc.StatusCode.UNAVAILABLE


def keys_file(folder: Path) -> Path:
    path = folder / "keys.yaml"
    path.write_text("keys: []\n")
    return path


async def test_a_server_shows_its_new_certificate_without_a_restart(folder: Path) -> None:
    caller = security_of(folder, "gateway")
    async with serving(security_of(folder, "decode").server_credentials()) as server:
        assert await ask(server.address, caller.towards(Role.DECODE)) is grpc.StatusCode.OK
        certificates.replace_authority(folder, PLAN)
        certificates.forget_earlier_authorities(folder)
        # A caller that trusts the new CA only, and shows a certificate of it.
        assert await ask(server.address, caller.towards(Role.DECODE)) is grpc.StatusCode.OK
        assert await ask(server.address, security_of(folder, "prefill").towards(Role.DECODE)) is grpc.StatusCode.OK
        assert server.roles == [{Role.GATEWAY}, {Role.GATEWAY}, {Role.PREFILL}]


async def test_a_forgotten_ca_opens_no_new_connection(folder: Path) -> None:
    pair = ((folder / "gateway.key").read_bytes(), (folder / "gateway.pem").read_bytes())
    async with serving(security_of(folder, "decode").server_credentials()) as server:
        certificates.replace_authority(folder, PLAN)
        both = (folder / "ca.pem").read_bytes()
        old = ChannelCredentials(grpc.ssl_channel_credentials(both, *pair), f"decode.{DOMAIN}", b"")
        assert await ask(server.address, old) is grpc.StatusCode.OK
        certificates.forget_earlier_authorities(folder)
        assert await ask(server.address, old) is grpc.StatusCode.UNAVAILABLE
        assert await ask(server.address, security_of(folder, "gateway").towards(Role.DECODE)) is grpc.StatusCode.OK


def test_credentials_stay_the_same_while_the_files_do(folder: Path) -> None:
    security = security_of(folder, "gateway")
    before = security.towards(Role.DECODE)
    assert security.towards(Role.DECODE) == before
    certificates.renew_certificates(folder, PLAN)
    assert security.towards(Role.DECODE) != before


def test_half_swapped_files_leave_the_old_pair_in_use(folder: Path) -> None:
    security = security_of(folder, "gateway")
    before, key = security.towards(Role.DECODE), (folder / "gateway.key").read_bytes()
    certificates.renew_certificates(folder, PLAN)
    new_key = (folder / "gateway.key").read_bytes()
    (folder / "gateway.key").write_bytes(key)
    assert security.towards(Role.DECODE) == before
    (folder / "gateway.key").unlink()
    assert security.towards(Role.DECODE) == before
    (folder / "gateway.key").write_bytes(new_key)
    assert security.towards(Role.DECODE) != before


def test_an_expired_certificate_does_not_replace_a_valid_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    security = security_of(folder, "gateway")
    before = security.towards(Role.DECODE)
    write_expired(folder, monkeypatch)
    assert security.towards(Role.DECODE) == before
    with pytest.raises(ConfigError, match="has expired"):
        security_of(folder, "gateway")


def test_links_are_followed_when_they_change(folder: Path, tmp_path: Path) -> None:
    """As Kubernetes swaps secrets: by one link to a folder."""
    link = tmp_path / "link"
    link.symlink_to(folder)
    security = security_of(link, "gateway")
    before = security.towards(Role.DECODE)
    renewed = tmp_path / "renewed"
    certificates.make_certificates(renewed, PLAN)
    fresh = tmp_path / "fresh"
    fresh.symlink_to(renewed)
    os.replace(fresh, link)
    assert security.towards(Role.DECODE) != before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tls_key": None}, "go together"),
        ({"tls_cert": None, "tls_key": None}, "go together"),
        ({"tls_cert": "/no/such/file"}, "cannot read /no/such/file"),
        ({"trust_domain": "other.example"}, r"does not name gateway\.other\.example"),
    ],
)
def test_files_that_cannot_be_used_are_named(folder: Path, change: dict[str, str | None], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        security_of(folder, "gateway", **change)


def test_a_certificate_of_another_role_is_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not name decode\.cluster\.example"):
        ProcessSecurity.of(settings_of(folder, "prefill"), Role.DECODE)


def test_a_key_of_another_certificate_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not the key"):
        security_of(folder, "gateway", tls_key=str(folder / "decode.key"))
