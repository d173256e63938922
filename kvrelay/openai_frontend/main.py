"""The process that serves OpenAI's HTTP API: the front, and smg as its child on loopback."""

import asyncio
import contextlib
import secrets
import signal
import ssl
import sys
from collections.abc import AsyncIterator

import structlog
from aiohttp import web

from kvrelay.client.addresses import Addresses
from kvrelay.client.api_keys import read_api_key
from kvrelay.config.settings import OpenAISettings
from kvrelay.errors import ConfigError, StartupError
from kvrelay.network.host_port import join_host_port
from kvrelay.network.http_bounds import HostNames, HttpBounds
from kvrelay.network.http_server import clean_up, listen
from kvrelay.network.listening import bind_sockets, check_port, is_loopback
from kvrelay.observability.logging import configure_logging
from kvrelay.openai_frontend import smg
from kvrelay.openai_frontend.front import OpenAIFront
from kvrelay.openai_frontend.gateway_channel import GatewayChannel
from kvrelay.openai_frontend.relay import running_relays
from kvrelay.openai_frontend.smg_arguments import parse_arguments
from kvrelay.runtime import event_loop
from kvrelay.runtime.child_process import ChildProcess
from kvrelay.runtime.supervision import describe_exit
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity

LOOPBACK = "127.0.0.1"
SMG_STOP_GRACE_S = 2.0
SHUTDOWN_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 2048
_POLL_INTERVAL_S = 0.1

_log = structlog.get_logger(__name__)


def run(settings: OpenAISettings) -> None:
    """Serves until SIGTERM or SIGINT."""
    configure_logging(settings.log_level, settings.log_format, role="openai")
    smg.check_installed()
    event_loop.run(serve(settings))


async def serve(settings: OpenAISettings, stop: asyncio.Event | None = None) -> None:
    keys = keys_of(settings.openai_api_key)
    check_host(settings, keys)
    arguments = parse_arguments(settings.openai_args, has_tenants=has_keys_file(settings))
    upstream_key = secrets.token_hex(32)
    ports = smg.SmgPorts(check_port(LOOPBACK, 0, "a port for smg"), check_port(LOOPBACK, 0, "a port for its metrics"))
    max_body_bytes = settings.openai_max_body_kib * 1024
    security = ProcessSecurity.of(settings.security, Role.FRONT)
    guard = security.http_guard if has_keys_file(settings) else None
    names = HostNames((settings.host, *(settings.openai_allowed_hosts or "").split(",")), "--openai-allowed-hosts")
    front = OpenAIFront(f"http://{LOOPBACK}:{ports.api}", keys, upstream_key, max_body_bytes, guard, names)
    stop = stop or _stop_on_signals()
    async with (
        security.watching(),
        _listening(front, settings, None if settings.local_clients else security.https_context()) as bound_port,
        running_relays(gateways_of(settings, security), front.requests) as relays,
        _running(
            smg.command(ports, relays or Addresses(settings.gateway).all, max_body_bytes, arguments), upstream_key
        ) as child,
    ):
        ended = asyncio.create_task(child.wait(), name="end of smg")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        ready = asyncio.create_task(_say_when_ready(front, settings, bound_port), name="readiness of smg")
        await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, stopped, ready):
            task.cancel()
        if not stop.is_set():
            raise StartupError(
                f"smg ended {describe_exit(child.exit_code or 0)}; its output:\n" + "\n".join(child.tail)
            )


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def _listening(front: OpenAIFront, settings: OpenAISettings, tls: ssl.SSLContext | None) -> AsyncIterator[int]:
    # handler_cancellation: a client that hangs up ends its request.
    runner = web.AppRunner(
        front.application(),
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    bounds = HttpBounds(max_connections=MAX_CONNECTIONS)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(clean_up, runner)
        yield await listen(runner, bind_sockets(settings.host, settings.port, "--port"), bounds, tls, stack)


@contextlib.asynccontextmanager
async def _running(command: list[str], key: str) -> AsyncIterator[ChildProcess]:
    child = ChildProcess("smg", command, smg.environment(), _print, smg.secret_arguments(key))
    await child.start()
    try:
        yield child
    finally:
        await child.stop(SMG_STOP_GRACE_S)


async def _say_when_ready(front: OpenAIFront, settings: OpenAISettings, port: int) -> None:
    while not await front.is_ready():  # noqa: ASYNC110  # another process
        await asyncio.sleep(_POLL_INTERVAL_S)
    _log.info("ready", address=join_host_port(settings.host, port), gateway=settings.gateway)


def gateways_of(settings: OpenAISettings, security: ProcessSecurity) -> list[GatewayChannel]:
    """Empty where smg can ask them itself."""
    key = None if settings.gateway_key_file is None else read_api_key(settings.gateway_key_file)
    if key is None and not has_keys_file(settings) and security.towards(Role.GATEWAY) is None:
        return []
    gateways = [GatewayChannel(address, security.towards, key) for address in Addresses(settings.gateway).all]
    for gateway in gateways:
        if has_keys_file(settings) and not gateway.hands_keys_on:
            _log.warning(
                "the gateway gets clients' tenants and not their keys, because the way there is not encrypted: "
                "give --tls-folder, or --tls-cert, --tls-key and --tls-ca, if it takes keys",
                gateway=gateway.address,
            )
    return gateways


def keys_of(text: str | None) -> list[str]:
    """Raises ConfigError if the setting is given but names no key."""
    if text is None:
        return []
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise ConfigError(
            "openai_api_key names no key: give keys separated by commas, or leave it out so that everybody may ask"
        )
    return keys


def check_host(settings: OpenAISettings, keys: list[str]) -> None:
    """Raises ConfigError for a host that others reach, without keys or with plain ones."""
    if is_loopback(settings.host) or settings.local_clients:
        return
    if not keys and not has_keys_file(settings):
        danger = "everybody who reaches the port may ask"
        needed = "set keys with KVRELAY_OPENAI_API_KEY or --keys-file"
    elif not settings.security.has_certificates:
        danger = "clients' keys come there in plain text"
        needed = "give certificates (--tls-folder, or --tls-cert, --tls-key and --tls-ca)"
    else:
        return
    if not settings.security.insecure:
        raise ConfigError(f"host is {settings.host!r}, which others reach, and {danger}: {needed}, or give --insecure")
    _log.warning(f"{danger}, because of --insecure", host=settings.host)


def has_keys_file(settings: OpenAISettings) -> bool:
    """Certificates open nothing: they name no tenant."""
    return settings.security.keys_file is not None or settings.security.jwks_file is not None


def _print(name: str, line: str) -> None:
    if smg.is_worth_showing(line):
        print(f"{name}: {line}", file=sys.stderr, flush=True)
