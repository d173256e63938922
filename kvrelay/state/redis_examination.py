"""Examines the server at a Redis url: kind, version, TLS, eviction."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis.asyncio
import redis.exceptions
import structlog

from kvrelay.state.redis_faults import (
    CLUSTER_SENTENCE,
    NEEDS_TLS_SENTENCE,
    NO_SENTINEL_SENTENCE,
    NO_TLS_SENTENCE,
    OLD_SENTENCE,
    OTHER_SERVICE_SENTENCE,
    SENTINEL_PASSWORD_SENTENCE,
    SENTINEL_RIGHTS_SENTENCE,
    SENTINEL_SENTENCE,
    RedisFault,
    fault_of,
)
from kvrelay.state.redis_tls import RedisTLS
from kvrelay.state.redis_url import RedisTarget

OLDEST_MAJOR_VERSION = 7  # the first with script flags (`#!lua flags=...`)
TLS_LOOK_TIMEOUT_S = 1.0

_log = structlog.get_logger(__name__)


async def execute(client: "redis.asyncio.Redis", *command: str | int | bytes, **place: Any) -> Any:
    """`place`: of a `RedisClient`."""
    return await client.execute_command(*command, **place)  # type: ignore[no-untyped-call]


async def examine(
    client: "redis.asyncio.Redis", places: Callable[[], Sequence[Mapping[str, Any]]]
) -> RedisFault | None:
    """A fault, or None; None also when this user may not ask."""
    for place in places():
        if (fault := await _examine_server(client, place)) is not None:
            return fault
    return None


async def _examine_server(client: "redis.asyncio.Redis", place: Mapping[str, Any]) -> RedisFault | None:
    information = await _ask(client, "INFO", place=place)
    mode = str(information.get("redis_mode") or information.get("server_mode"))  # the latter is Valkey's
    if mode == "sentinel":
        return RedisFault(SENTINEL_SENTENCE, needs_a_person=True, is_refusal=True)
    version = re.match(r"\d+", str(information.get("redis_version", "")))
    if version is not None and int(version[0]) < OLDEST_MAJOR_VERSION:
        return RedisFault(OLD_SENTENCE, needs_a_person=True, is_refusal=True)
    is_cluster = mode == "cluster" or str(information.get("cluster_enabled", 0)) == "1"
    # The node of a single shard has every key.
    if is_cluster and not place and await _num_shards(client) != 1:
        return RedisFault(CLUSTER_SENTENCE, needs_a_person=True, is_refusal=True)
    _warn_of_eviction(information)
    return None


async def examine_sentinels(sentinels: Sequence["redis.asyncio.Redis"], service: str) -> RedisFault | None:
    """Passes when one of them watches the service."""
    watched: set[str] = set()
    faults: list[RedisFault] = []
    for sentinel in sentinels:
        try:
            watched.update(await _services_of(sentinel))
        except (OSError, TimeoutError, redis.exceptions.RedisError) as error:
            faults.append(_fault_of_sentinel(error))
    if service in watched:
        return None
    if watched or not faults:
        names = ", ".join(sorted(watched)) or "none"
        return RedisFault(f"{OTHER_SERVICE_SENTENCE}: they watch {names}", needs_a_person=True, is_refusal=True)
    return next((fault for fault in faults if fault.needs_a_person), faults[0])


async def _services_of(sentinel: "redis.asyncio.Redis") -> list[str]:
    services: dict[str, Any] = await execute(sentinel, "SENTINEL MASTERS")
    return list(services)


def _fault_of_sentinel(error: Exception) -> RedisFault:
    if isinstance(error, redis.exceptions.AuthenticationError):
        return RedisFault(SENTINEL_PASSWORD_SENTENCE, needs_a_person=True, is_refusal=True)
    if isinstance(error, redis.exceptions.NoPermissionError):
        return RedisFault(SENTINEL_RIGHTS_SENTENCE, needs_a_person=True, is_refusal=True)
    if isinstance(error, redis.exceptions.ResponseError) and "unknown command" in str(error).lower():
        return RedisFault(NO_SENTINEL_SENTENCE, needs_a_person=True, is_refusal=True)
    return fault_of(error) or RedisFault(f"a Sentinel refuses what kvrelay asks ({type(error).__name__})")


async def _num_shards(client: "redis.asyncio.Redis") -> int:
    """0 when no node has keys, or this user may not ask."""
    return int((await _ask(client, "CLUSTER", "INFO", place={})).get("cluster_size", 0))


def _warn_of_eviction(information: dict[str, Any]) -> None:
    policy, limit = str(information.get("maxmemory_policy", "noeviction")), information.get("maxmemory", 0)
    if policy != "noeviction" and str(limit) != "0":
        _log.warning(
            "redis throws away request state and leases when it is full: set maxmemory-policy noeviction",
            maxmemory_policy=policy,
        )


async def _ask(client: "redis.asyncio.Redis", *command: str, place: Mapping[str, Any]) -> dict[str, Any]:
    """Empty when this user may not ask."""
    try:
        answer = await execute(client, *command, **place)
    except redis.exceptions.ResponseError as error:
        fault = fault_of(error)
        if fault is not None and not fault.needs_a_person:
            raise
        return {}
    if isinstance(answer, dict):
        return {str(name): value for name, value in answer.items()}
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


async def look_for_tls(target: RedisTarget, tls: RedisTLS | None) -> RedisFault | None:
    """A fault when one of url and port speaks no TLS, or the port refuses our certificate."""
    if target.scheme == "unix":
        return None
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(TLS_LOOK_TIMEOUT_S):
            if tls is not None:
                if await _speaks_plainly(target):
                    return RedisFault(NO_TLS_SENTENCE, needs_a_person=True)
                return await _refusal(target, tls.context())
            return RedisFault(NEEDS_TLS_SENTENCE, needs_a_person=True) if await _shakes_hands(target) else None
    return None


async def _speaks_plainly(target: RedisTarget) -> bool:
    reader, writer = await asyncio.open_connection(target.location["host"], target.location["port"])
    try:
        writer.write(b"PING\r\n")
        return await reader.read(1) in (b"+", b"-")
    except ConnectionError:  # what it got is no TLS
        return False
    finally:
        writer.close()


async def _refusal(target: RedisTarget, context: ssl.SSLContext) -> RedisFault | None:
    """Sends nothing: a refusal under TLS 1.3 follows the handshake, and may be lost in a reset."""
    try:
        reader, writer = await asyncio.open_connection(target.location["host"], target.location["port"], ssl=context)
        try:
            await reader.read(1)
        finally:
            writer.transport.abort()
    except ssl.SSLError as error:
        return fault_of(error)
    return None


async def _shakes_hands(target: RedisTarget) -> bool:
    """Sends nothing over this connection, so the certificate need not be verified."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        _, writer = await asyncio.open_connection(target.location["host"], target.location["port"], ssl=context)
    except ssl.SSLError as error:
        return "ALERT" in str(error.reason)  # of a server that wants a certificate, for instance
    writer.transport.abort()
    return True
