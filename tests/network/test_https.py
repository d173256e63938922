"""The HTTP port over TLS: whom it lets in, which files count, and what a handshake may take."""

import asyncio
import functools
import inspect
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvrelay.network.http_bounds import HttpBounds
from kvrelay.network.http_server import Health, serving_http
from kvrelay.runtime import event_loop
from kvrelay.security import certificates
from kvrelay.security.certificate_files import CertificateFiles
from kvrelay.security.certificates import CertificatePlan
from kvrelay.security.guard import Guard
from kvrelay.security.https import https_context
from kvrelay.security.method_rules import OPEN, Rule
from kvrelay.security.principal import Principal, Role
from kvrelay.security.role_names import peer_roles
from tests.security.test_guard import Tokens

HOST = "127.0.0.1"
DOMAIN = "cluster.example"
PLAN = CertificatePlan(DOMAIN)
SERVER_NAME = f"decode.{DOMAIN}"
METRICS = Rule(frozenset({Role.METRICS, Role.OPERATOR}))
KEY = {"Authorization": "Bearer metrics-key"}
TIMEOUT_S = 30.0


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A process has uvloop's loop where it is installed, whose TLS is its own."""

    def both(run: Callable[[Coroutine[Any, Any, None]], None], **fixtures: Any) -> None:
        run(test(**fixtures))

    signature = inspect.signature(test)
    run = inspect.Parameter("run", inspect.Parameter.KEYWORD_ONLY)
    both.__signature__ = signature.replace(parameters=[*signature.parameters.values(), run], return_annotation=None)  # type: ignore[attr-defined]  # what pytest reads
    marked: Callable[..., None] = pytest.mark.parametrize(
        "run", [asyncio.run, event_loop.run], ids=["asyncio", "uvloop"]
    )(both)
    return marked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "certificates"
    certificates.make_certificates(made, PLAN)
    return made


@asynccontextmanager
async def serving(folder: Path, bounds: HttpBounds | None = None) -> AsyncIterator[int]:
    files = CertificateFiles(*(str(folder / name) for name in ("decode.pem", "decode.key", "ca.pem")))
    tokens = Tokens({"metrics-key": Principal(frozenset({Role.METRICS}), "", "m", proof="m")})
    rules = {"GET /healthz": OPEN, "GET /metrics": METRICS}
    guard = Guard(rules, [tokens], functools.partial(peer_roles, trust_domain=DOMAIN))

    def add(application: web.Application) -> None:
        async def metrics(request: web.Request) -> web.Response:
            return web.Response(text="metrics")

        application.router.add_get("/metrics", metrics)

    tls = https_context(files)
    async with serving_http(HOST, 0, lambda: Health.SERVING, add, guard=guard, bounds=bounds, tls=tls) as port:
        assert port is not None
        yield port


def caller(folder: Path, role: str | None = None, trusted: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str((trusted or folder) / "ca.pem"))
    if role is not None:
        context.load_cert_chain(folder / f"{role}.pem", folder / f"{role}.key")
    return context


async def status(port: int, context: ssl.SSLContext, path: str = "/metrics", **headers: str) -> int:
    connector = aiohttp.TCPConnector(force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(
            f"https://{HOST}:{port}{path}", ssl=context, server_hostname=SERVER_NAME, headers=headers
        ) as response,
    ):
        return response.status


@on_both_loops
async def test_certificates_and_keys_let_in_whom_the_table_names(folder: Path) -> None:
    async with serving(folder) as port:
        assert await status(port, caller(folder, "metrics")) == 200
        assert await status(port, caller(folder, "operator")) == 200
        assert await status(port, caller(folder), **KEY) == 200
        assert await status(port, caller(folder, "client"), **KEY) == 200
        assert await status(port, caller(folder, "gateway")) == 403
        assert await status(port, caller(folder, "client")) == 403
        assert await status(port, caller(folder)) == 401
        assert await status(port, caller(folder), "/healthz") == 200


@on_both_loops
async def test_a_certificate_of_another_authority_does_not_get_in(folder: Path, tmp_path: Path) -> None:
    certificates.make_certificates(tmp_path / "other", PLAN)
    async with serving(folder) as port:
        with pytest.raises(aiohttp.ClientError):
            await status(port, caller(tmp_path / "other", "metrics", trusted=folder))
        with pytest.raises(aiohttp.ClientError):
            await status(port, caller(tmp_path / "other"))
        assert await status(port, caller(folder), "/healthz") == 200


@on_both_loops
async def test_plain_text_and_old_versions_of_tls_get_no_answer(folder: Path) -> None:
    async with serving(folder) as port:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in await asyncio.wait_for(reader.read(), TIMEOUT_S)
        writer.close()
        old = caller(folder)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(aiohttp.ClientError):
            await status(port, old, "/healthz")


@on_both_loops
async def test_a_connection_leaves_no_ticket_that_would_outlive_its_certificate(folder: Path) -> None:
    async with serving(folder) as port:
        context = caller(folder, "metrics")
        reader, writer = await asyncio.open_connection(HOST, port, ssl=context, server_hostname=SERVER_NAME)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"200" in await asyncio.wait_for(reader.read(), TIMEOUT_S)  # tickets come before the answer
        session = writer.get_extra_info("ssl_object").session
        writer.close()
    assert not session.has_ticket


async def serial_number(port: int, context: ssl.SSLContext) -> str:
    _, writer = await asyncio.open_connection(HOST, port, ssl=context, server_hostname=SERVER_NAME)
    number: str = writer.get_extra_info("peercert")["serialNumber"]
    writer.close()
    return number


@on_both_loops
async def test_renewed_files_count_for_the_next_handshake_and_broken_ones_never(folder: Path) -> None:
    async with serving(folder) as port:
        first = await serial_number(port, caller(folder))
        certificates.renew_certificates(folder, PLAN)
        second = await serial_number(port, caller(folder))
        break_key(folder)
        assert await serial_number(port, caller(folder)) == second != first


def break_key(folder: Path) -> None:
    (folder / "decode.key").write_text("no key")


@on_both_loops
async def test_a_forgotten_authority_lets_nobody_in(folder: Path, tmp_path: Path) -> None:
    old = caller(folder, "metrics")
    async with serving(folder) as port:
        certificates.replace_authority(folder, PLAN)
        old.load_verify_locations(folder / "ca.pem")
        assert await status(port, old) == 200, "the old one is still trusted"
        certificates.forget_earlier_authorities(folder)
        with pytest.raises(aiohttp.ClientError):
            await status(port, old)
        assert await status(port, caller(folder, "metrics")) == 200


@on_both_loops
async def test_handshakes_are_bounded_in_number_and_time_and_room_is_given_back(folder: Path) -> None:
    async with serving(folder, HttpBounds(max_connections=2, silence_timeout_s=2.0)) as port:
        silent = [await asyncio.open_connection(HOST, port) for _ in range(2)]
        reader, writer = await asyncio.open_connection(HOST, port)
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b"", "one too many"
        writer.close()
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b"", "its time is over"
            writer.close()
        assert await status(port, caller(folder), "/healthz") == 200


@on_both_loops
async def test_the_end_does_not_wait_for_handshakes(folder: Path) -> None:
    async with asyncio.timeout(TIMEOUT_S), serving(folder) as port:
        kept = [await asyncio.open_connection(HOST, port) for _ in range(3)]
    for _, writer in kept:
        writer.close()
