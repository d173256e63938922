"""Every method and every route of every process, by the servers' own handlers, for every role.

The processes are what `serve` of each builds. Only what the tables allow is answered.
"""

import asyncio
import contextlib
import itertools
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

import decode_worker.main
import gateway.main
import gateway.service
import prefill_worker.main
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import DecodeSettings, GatewaySettings, PrefillSettings, RequestSettings, ServerSettings
from kvrelay.errors import AccessDeniedError, UnauthenticatedError
from kvrelay.network.rpc import create_channel
from kvrelay.openai_frontend.front import OpenAIFront
from kvrelay.openai_frontend.gateway_channel import GatewayChannel
from kvrelay.openai_frontend.open_requests import OpenRequests
from kvrelay.openai_frontend.relay import Relay
from kvrelay.security import certificates
from kvrelay.security.certificates import CertificatePlan, new_authority
from kvrelay.security.credentials import ChannelCredentials, in_plain_text
from kvrelay.security.keys import digest_of
from kvrelay.security.method_rules import GRPC_RULES, HTTP_RULES
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.security.role_names import server_name
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.wire.errors import DETAILS_METADATA_KEY, error_of_rpc
from tests.security.test_json_web_tokens import KEY_SET, token
from tests.support.worker_fixtures import tiny_engine

CALL_TIMEOUT_S = 60.0
PROCESSES = (Role.GATEWAY, Role.PREFILL, Role.DECODE)
KEY_ROLES = (Role.CLIENT, Role.OPERATOR, Role.METRICS, Role.FRONT)
PLAN = CertificatePlan("kvrelay.local")
OTHER_CA = "another CA's "


@dataclass
class Surface:
    """A running process, and all that its servers were given."""

    role: Role
    folder: Path
    methods: set[str] = field(default_factory=set)
    routes: set[str] = field(default_factory=set)
    grpc_ports: list[int] = field(default_factory=list)
    """A gateway's first takes keys, its second certificates."""
    http_port: int = 0


@dataclass(frozen=True)
class Caller:
    """`certificate` is the name of its files; without one, it trusts the CA and shows nothing."""

    name: str
    key: str | None = None
    certificate: str | None = None
    plain_text: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}


def write_credentials(folder: Path) -> SecuritySettings:
    """Keys that are named as their roles, and a certificate for each role, also of another CA."""
    entries: list[dict[str, Any]] = []
    for role in KEY_ROLES:
        entry = {"tenant": "t", "roles": [role.value]}
        entries.append(entry | {"id": role.value, "sha256": digest_of(role.value)})
        expired = f"expired-{role.value}"
        entries.append(entry | {"id": expired, "sha256": digest_of(expired), "expires": "PAST"})
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}).replace("PAST", "2020-01-01"))
    certificates.make_certificates(folder, PLAN)
    for prefix, authority in (("", certificates.read_authority(folder)), (OTHER_CA, new_authority("kvrelay.local"))):
        for role in Role:
            key, certificate = certificates.issue(authority, role, PLAN)
            (folder / f"{prefix}{role.value}.key").write_bytes(key)
            (folder / f"{prefix}{role.value}.pem").write_bytes(certificate)
    return SecuritySettings(keys_file=str(folder / "keys.yaml"), tls_ca=str(folder / "ca.pem"))


@contextlib.contextmanager
def recorded(surface: Surface) -> Iterator[None]:
    """Notes what servers are given while they are built."""
    with pytest.MonkeyPatch.context() as patch:
        server_class: Any = type(grpc.aio.server())
        add, set_up = server_class.add_generic_rpc_handlers, web.AppRunner.setup
        add_port = server_class.add_secure_port

        def add_handlers(server: Any, handlers: Any) -> None:
            for handler in handlers:
                surface.methods.update(handler._method_handlers)
            add(server, handlers)

        def add_secure_port(server: Any, address: str, credentials: Any) -> int:
            port: int = add_port(server, address, credentials)
            surface.grpc_ports.append(port)
            return port

        async def set_up_runner(runner: web.AppRunner) -> None:
            for route in runner.app.router.routes():
                if route.method != "HEAD" and route.resource is not None:
                    surface.routes.add(f"{route.method} {route.resource.canonical}")
            await set_up(runner)

        patch.setattr(server_class, "add_generic_rpc_handlers", add_handlers)
        patch.setattr(server_class, "add_secure_port", add_secure_port)
        patch.setattr(web.AppRunner, "setup", set_up_runner)
        patch.setattr(gateway.service, "MODEL_WAIT_S", 0.01)
        yield


def with_certificates(folder: Path, role: Role) -> SecuritySettings:
    own = {"tls_cert": str(folder / f"{role.value}.pem"), "tls_key": str(folder / f"{role.value}.key")}
    return write_credentials(folder).model_copy(update=own)


@asynccontextmanager
async def running(role: Role, folder: Path, security: SecuritySettings) -> AsyncIterator[Surface]:
    surface, stop = Surface(role, folder), asyncio.Event()
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with EmbeddedValkey() as valkey:
        server = ServerSettings(redis_url=valkey.url, http_port=0, log_level="info", drain_timeout_ms=0)
        with recorded(surface), told_of_readiness(ready):
            serving = asyncio.create_task(serve(role, server, security, stop))
            waiting: list[asyncio.Future[Any]] = [serving, ready]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=CALL_TIMEOUT_S)
            if not ready.done():
                serving.cancel()
                await serving
            surface.http_port = ready.result()
            yield surface
            stop.set()
            await asyncio.wait_for(serving, CALL_TIMEOUT_S)


@contextlib.contextmanager
def told_of_readiness(ready: "asyncio.Future[int]") -> Iterator[None]:
    """Sets the future to the HTTP port once it is bound: the last thing that starts."""
    from kvrelay.network import http_server

    listen: Callable[..., Any] = http_server.listen

    async def listen_and_tell(*arguments: Any) -> int:
        port: int = await listen(*arguments)
        ready.set_result(port)
        return port

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server, "listen", listen_and_tell)
        yield


async def serve(role: Role, server: ServerSettings, security: SecuritySettings, stop: asyncio.Event) -> None:
    if role is Role.GATEWAY:
        requests = RequestSettings(worker_wait_ms=1)
        await gateway.main.serve(GatewaySettings(server=server, security=security, requests=requests), stop)
        return
    engine, guarded = tiny_engine("llama"), ProcessSecurity.of(security, role)
    if role is Role.PREFILL:
        await prefill_worker.main.serve(PrefillSettings(server=server, security=security), engine, guarded, stop)
    else:
        await decode_worker.main.serve(DecodeSettings(server=server, security=security), engine, guarded, stop)


@pytest.fixture(params=PROCESSES, ids=str)
async def surface(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Surface]:
    async with running(request.param, tmp_path, with_certificates(tmp_path, request.param)) as surface:
        yield surface


def channel_of(surface: Surface, caller: Caller) -> grpc.aio.Channel:
    """To the port for such callers; workers have one for all."""
    port = surface.grpc_ports[-1 if caller.certificate is not None else 0]
    if caller.plain_text:
        return create_channel(f"127.0.0.1:{port}")
    key = certificate = None
    if caller.certificate is not None:
        key = (surface.folder / f"{caller.certificate}.key").read_bytes()
        certificate = (surface.folder / f"{caller.certificate}.pem").read_bytes()
    tls = grpc.ssl_channel_credentials((surface.folder / "ca.pem").read_bytes(), key, certificate)
    name = server_name(surface.role, PLAN.trust_domain)
    return create_channel(f"127.0.0.1:{port}", credentials=ChannelCredentials(tls, name, b""))


async def answer_of_call(channel: grpc.aio.Channel, method: str, caller: Caller) -> str:
    """ "let in", "unknown", "denied", or "no connection"."""
    # One message and the end of them, which suits methods of all kinds.
    call_method: Any = channel.unary_stream(method)
    call: Any = call_method(b"", timeout=CALL_TIMEOUT_S, metadata=tuple(caller.headers.items()))
    try:
        await call.read()
        if not call.done():
            return "let in"  # it streams
        code, details = await call.code(), await call.details()
        status = grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), details)
        return "let in" if code is grpc.StatusCode.OK else _kind_of(status)
    except grpc.aio.AioRpcError as failure:
        return _kind_of(failure)
    finally:
        call.cancel()


def _kind_of(failure: grpc.aio.AioRpcError) -> str:
    assert failure.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    is_ours = any(key == DETAILS_METADATA_KEY for key, _ in failure.trailing_metadata() or ())
    if failure.code() is grpc.StatusCode.UNAVAILABLE and not is_ours:
        return "no connection"
    error = error_of_rpc(failure)
    if isinstance(error, UnauthenticatedError):
        return "unknown"
    return "denied" if isinstance(error, AccessDeniedError) else "let in"


def known_callers(process: Role) -> Iterator[tuple[Caller, frozenset[Role]]]:
    """Callers that get through the handshake and prove something, and their roles.

    A certificate proves no client: that takes a tenant.
    """
    for role in Role:
        proven = frozenset({role}) - {Role.CLIENT}
        yield Caller(f"certificate of {role}", certificate=role.value), proven
    if process is Role.GATEWAY:
        for role in KEY_ROLES:
            yield Caller(f"key of {role}", role.value), frozenset({role})


def strangers() -> Iterator[Caller]:
    """Callers without certificates that prove nothing, or nothing valid now."""
    yield from (Caller("nobody"), Caller("unknown key", "kvr_unknown"))
    for role in KEY_ROLES:
        yield Caller(f"expired key of {role}", f"expired-{role.value}")


def refused_in_the_handshake(process: Role) -> Iterator[Caller]:
    for role in Role:
        yield Caller(f"{OTHER_CA}certificate of {role}", certificate=f"{OTHER_CA}{role.value}")
    yield Caller("nobody in plain text", plain_text=True)
    yield Caller("key in plain text", Role.CLIENT.value, plain_text=True)
    if process is not Role.GATEWAY:  # workers are called with certificates only
        yield from strangers()
        for role in KEY_ROLES:
            yield Caller(f"key of {role}", role.value)


async def test_every_method_has_a_rule_and_every_rule_a_method(surface: Surface) -> None:
    assert surface.methods == set(GRPC_RULES[surface.role])
    assert surface.routes == set(HTTP_RULES[surface.role])


async def test_every_method_answers_the_roles_of_the_table_and_nobody_else(surface: Surface) -> None:
    def wanted_of(caller: Caller, roles: frozenset[Role] | None, method: str) -> str:
        rule = GRPC_RULES[surface.role][method]
        if roles is None:
            return "let in" if rule.is_open else "unknown"
        return "let in" if rule.is_open or roles & rule.roles else "denied"

    callers: list[tuple[Caller, frozenset[Role] | None]] = list(known_callers(surface.role))
    if surface.role is Role.GATEWAY:
        callers += [(caller, None) for caller in strangers()]
    wrong = []
    for caller, roles in callers:
        async with channel_of(surface, caller) as channel:
            for method in sorted(surface.methods):
                given, wanted = await answer_of_call(channel, method, caller), wanted_of(caller, roles, method)
                if given != wanted:
                    wrong.append(f"{method}, {caller.name}: {given}, not {wanted}")
    assert wrong == []


async def test_nobody_gets_past_the_handshake_without_what_it_asks_for(surface: Surface) -> None:
    wrong = []
    for caller in refused_in_the_handshake(surface.role):
        async with channel_of(surface, caller) as channel:
            for method in sorted(surface.methods):
                given = await answer_of_call(channel, method, caller)
                if given != "no connection":
                    wrong.append(f"{method}, {caller.name}: {given}")
    assert wrong == []


async def test_every_route_answers_the_roles_of_the_table_and_nobody_else(surface: Surface) -> None:
    callers: list[tuple[Caller, frozenset[Role] | None]] = [(caller, None) for caller in strangers()]
    for role in Role:  # the port takes keys and certificates, of every process
        proven = frozenset({role}) - {Role.CLIENT}
        callers.append((Caller(f"certificate of {role}", certificate=role.value), proven))
    callers += [(Caller(f"key of {role}", role.value), frozenset({role})) for role in KEY_ROLES]
    wrong = []
    for caller, roles in callers:
        async with session_of(surface, caller) as session:
            for route in sorted(surface.routes):
                rule = HTTP_RULES[surface.role][route]
                refused = "unknown" if roles is None else "denied"
                wanted = "let in" if rule.is_open or (roles or frozenset()) & rule.roles else refused
                given = await answer_of_route(session, route, caller.headers)
                if given != wanted:
                    wrong.append(f"{route}, {caller.name}: {given}, not {wanted}")
    assert wrong == []


async def test_every_method_of_a_fronts_relay_has_a_rule_and_every_rule_a_method(tmp_path: Path) -> None:
    """tests/openai_frontend/test_relay.py says who gets in: smg alone."""
    surface = Surface(Role.FRONT, tmp_path)
    with recorded(surface):
        relay = Relay(GatewayChannel("127.0.0.1:9", in_plain_text, None), OpenRequests())
    assert surface.methods == set(GRPC_RULES[Role.FRONT])
    await relay.stop()


async def test_every_route_of_a_front_answers_the_roles_of_the_table_and_nobody_else(tmp_path: Path) -> None:
    surface = Surface(Role.FRONT, tmp_path)
    security = SecuritySettings(keys_file=write_credentials(tmp_path).keys_file)
    guard = ProcessSecurity.of(security, Role.FRONT).http_guard
    front = OpenAIFront("http://127.0.0.1:9", (), "inner", 1000, guard)  # the discard port: no smg
    callers = [(caller, frozenset[Role]()) for caller in strangers()]
    callers += [(Caller(role, role.value), frozenset({role})) for role in KEY_ROLES]
    wrong = []
    with recorded(surface):
        async with TestServer(front.application()) as server, aiohttp.ClientSession(server.make_url("/")) as session:
            assert surface.routes == set(HTTP_RULES[Role.FRONT])
            for route, (caller, roles) in itertools.product(sorted(surface.routes), callers):
                rule = HTTP_RULES[Role.FRONT][route]
                wanted = "let in" if rule.is_open or roles & rule.roles else "denied" if roles else "unknown"
                given = await answer_of_route(session, route, caller.headers)
                if given != wanted:
                    wrong.append(f"{route}, {caller.name}: {given}, not {wanted}")
    assert wrong == []


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE], ids=str)
async def test_a_worker_with_keys_and_tokens_alone_guards_its_routes_by_them(role: Role, tmp_path: Path) -> None:
    jwks = written(tmp_path / "jwks.json", json.dumps(KEY_SET))
    tokens = {"jwks_file": jwks, "jwt_issuer": "https://issuer", "jwt_audience": "kvrelay"}
    security = write_credentials(tmp_path).model_copy(update={"tls_ca": None, **tokens})
    soon = time.time() + 600
    callers = [(caller.name, caller.headers, "unknown") for caller in strangers()]
    for each in KEY_ROLES:
        wanted = "let in" if each in HTTP_RULES[role]["GET /metrics"].roles else "denied"
        callers.append((f"key of {each}", Caller("", each.value).headers, wanted))
        if each is not Role.FRONT:  # no token makes one
            callers.append((f"token of {each}", Caller("", token(roles=[each.value], exp=soon)).headers, wanted))
    callers.append(("expired token", Caller("", token(roles=["operator"], exp=time.time() - 600)).headers, "unknown"))
    given: dict[str, str] = {}
    async with (
        running(role, tmp_path, security) as surface,
        aiohttp.ClientSession(f"http://127.0.0.1:{surface.http_port}") as session,
    ):
        assert surface.routes == {"GET /healthz", "GET /metrics"}
        for name, headers, _ in callers:
            assert await answer_of_route(session, "GET /healthz", headers) == "let in"
            given[name] = await answer_of_route(session, "GET /metrics", headers)
    assert given == {name: wanted for name, _, wanted in callers}


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


async def test_no_route_answers_without_the_handshake(surface: Surface) -> None:
    callers = [Caller(f"{OTHER_CA}certificate of {role}", certificate=f"{OTHER_CA}{role.value}") for role in Role]
    callers += [
        Caller("nobody in plain text", plain_text=True),
        Caller("key in plain text", "operator", plain_text=True),
    ]
    for caller in callers:
        async with session_of(surface, caller) as session:
            for route in sorted(surface.routes):
                with pytest.raises(aiohttp.ClientError):
                    await answer_of_route(session, route, caller.headers)


@asynccontextmanager
async def session_of(surface: Surface, caller: Caller) -> AsyncIterator[aiohttp.ClientSession]:
    context = ssl.create_default_context(cafile=str(surface.folder / "ca.pem"))
    if caller.certificate is not None:
        certificate, key = (surface.folder / f"{caller.certificate}.{ending}" for ending in ("pem", "key"))
        context.load_cert_chain(certificate, key)
    context.check_hostname = False  # workers' certificates name no host
    scheme = "http" if caller.plain_text else "https"
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(f"{scheme}://127.0.0.1:{surface.http_port}", connector=connector) as session:
        yield session


async def answer_of_route(session: aiohttp.ClientSession, route: str, headers: dict[str, str]) -> str:
    method, _, path = route.partition(" ")
    async with session.request(method, re.sub(r"{\w+}", "0" * 32, path), headers=headers) as answer:
        return {401: "unknown", 403: "denied"}.get(answer.status, "let in")
