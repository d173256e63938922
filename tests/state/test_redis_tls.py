"""Redis over TLS with certificates of both sides, against Debian's redis-server."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from cryptography.hazmat.primitives import serialization

from kvrelay.errors import ConfigError
from kvrelay.runtime import event_loop
from kvrelay.security import certificates
from kvrelay.security.certificates import CertificatePlan
from kvrelay.state.redis_connection import RedisConnection, check_redis_at
from kvrelay.state.redis_examination import look_for_tls
from kvrelay.state.redis_tls import RedisTLS
from kvrelay.state.redis_url import parse_redis_url
from kvrelay.state.state_store import StateStore
from tests.support.redis_fixtures import eventually, make_record
from tests.support.tls_redis import TIMEOUT_MS, TLSRedis, tls_redis

PLAN = CertificatePlan("kvrelay.local")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.make_certificates(tmp_path / "certificates", PLAN)
    return tmp_path / "certificates"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Of another CA."""
    certificates.make_certificates(tmp_path / "foreign", PLAN)
    return tmp_path / "foreign"


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[TLSRedis]:
    async with tls_redis(folder) as started:
        yield started


async def test_a_user_with_a_password_file_and_a_certificate_keeps_requests(server: TLSRedis, folder: Path) -> None:
    url = server.settings(folder).required_redis_url()
    async with RedisConnection(url, TIMEOUT_MS) as connection:
        await connection.check()
        assert await StateStore(connection, "g1").create(make_record())
        assert (await StateStore(connection, "g1").get("r1")) is not None
    async with server.admin() as client:
        assert await client.exists("kvrelay:{r1}:request")


@pytest.mark.parametrize("run", [asyncio.run, event_loop.run])
@pytest.mark.parametrize(
    ("ca_of", "certificate_of", "role", "said"),
    [
        ("foreign", "certificates", "gateway", r"Redis's certificate does not verify.*--redis-tls-ca"),
        ("certificates", "certificates", None, r"wants a certificate of its clients: give --redis-tls-cert"),
        ("certificates", "foreign", "gateway", r"refuses the certificate of --redis-tls-cert \(unknown ca\)"),
    ],
)
async def test_foreign_and_missing_certificates_are_refused_and_the_error_says_what_to_give(
    server: TLSRedis,
    foreign: Path,
    ca_of: str,
    certificate_of: str,
    role: str | None,
    said: str,
    run: Any,
) -> None:
    root = foreign.parent
    settings = server.settings(root / certificate_of, role, redis_tls_ca=f"{root / ca_of}/ca.pem")
    for _ in range(3):  # the server's reset may come before its reason
        with pytest.raises(ConfigError, match=said):
            await asyncio.to_thread(lambda: run(check_redis_at(settings.required_redis_url())))


async def test_a_refusal_is_read_where_nothing_is_sent(server: TLSRedis, folder: Path) -> None:
    """What a client sends after its handshake may be answered by a reset, which has no reason."""
    target = parse_redis_url(server.settings(folder, None).required_redis_url())
    fault = await look_for_tls(target, RedisTLS(target.options))
    assert fault is not None
    assert fault.needs_a_person
    assert "--redis-tls-cert" in fault.sentence
    target = parse_redis_url(server.settings(folder).required_redis_url())
    assert await look_for_tls(target, RedisTLS(target.options)) is None


async def test_a_server_with_another_name_is_to_be_dialled_by_its_own(server: TLSRedis, folder: Path) -> None:
    await server.read_certificates("decode")  # names no host
    with pytest.raises(ConfigError, match="dial it by a name of its certificate"):
        await check_redis_at(server.settings(folder).required_redis_url())


async def test_a_new_ca_and_new_certificates_count_from_the_next_connection_on(server: TLSRedis, folder: Path) -> None:
    async with RedisConnection(server.settings(folder).required_redis_url(), TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        assert await store.create(make_record("r0"))
        for number, renew in enumerate((certificates.renew_certificates, certificates.replace_authority), 1):
            renew(folder, PLAN)
            certificates.forget_earlier_authorities(folder)
            await server.read_certificates()

            async def is_created(number: int = number) -> bool:
                return connection.health.healthy and await store.create(make_record(f"r{number}"))

            await eventually(is_created)


async def test_broken_files_leave_those_before_in_use(server: TLSRedis, folder: Path) -> None:
    target = parse_redis_url(server.settings(folder).required_redis_url())
    tls = RedisTLS(target.options)
    first = tls.context()
    assert tls.context() is first
    (folder / "gateway.key").write_bytes((folder / "decode.key").read_bytes())
    with structlog.testing.capture_logs() as lines:
        assert tls.context() is first
        assert tls.context() is first
        (folder / "gateway.key").unlink()
        assert tls.context() is first
    assert [line["log_level"] for line in lines] == ["warning", "warning"]
    assert "gateway.key is not the key of the certificate" in lines[0]["problem"]
    assert "gateway.key" in lines[1]["problem"]
    certificates.renew_certificates(folder, PLAN)
    assert tls.context() is not first
    assert await look_for_tls(target, tls) is None


def make_unreadable(path: Path) -> None:
    path.write_bytes(b"no PEM")


def encrypt(path: Path) -> None:
    key: Any = serialization.load_pem_private_key(path.read_bytes(), password=None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
    )


def take_anothers(path: Path) -> None:
    path.write_bytes(path.with_stem("decode").read_bytes())


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("ca.pem", make_unreadable, r"ca\.pem has no PEM certificates of CAs"),
        ("gateway.pem", make_unreadable, r"gateway\.pem and .*gateway\.key are no PEM certificate and its key"),
        ("gateway.key", take_anothers, r"gateway\.key is not the key of the certificate in .*gateway\.pem"),
        ("gateway.key", encrypt, "the key is encrypted: write it without a password"),
    ],
)
def test_files_that_cannot_be_used_stop_the_start(folder: Path, name: str, spoil: Any, said: str) -> None:
    spoil(folder / name)
    url = (
        f"rediss://127.0.0.1:1/0?ssl_ca_certs={folder}/ca.pem&ssl_certfile={folder}/gateway.pem"
        f"&ssl_keyfile={folder}/gateway.key"
    )
    with pytest.raises(ConfigError, match=said):
        RedisTLS(parse_redis_url(url).options)


def test_only_the_given_cas_are_trusted(folder: Path) -> None:
    options = {"ssl_ca_certs": f"{folder}/ca.pem"}
    assert len(RedisTLS(options).context().get_ca_certs()) == 1
