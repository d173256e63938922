"""Whether a process may listen on a host: others reach it only with credentials, and encrypted."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from kvrelay.errors import StartupError
from kvrelay.network.listening import is_loopback

INSECURE_NAME = "kvrelay.v1.Insecure"
"""Not a service: its health serves where --insecure leaves a danger."""
CREDENTIALS_NAME = "kvrelay.v1.Credentials"
"""Likewise: its health does not serve while a changed file of credentials cannot be used."""
LOOK_INTERVAL_S = 0.5
REMINDER_INTERVAL_S = 60.0

_log = structlog.get_logger(__name__)


def exposure_of(host: str, danger: str | None, *, insecure: bool) -> str | None:
    """The danger, if others reach the host: StartupError then, unless `insecure`."""
    if danger is None or is_loopback(host):
        return None
    if not insecure:
        raise StartupError(
            f"others reach {host}, and {danger}: give certificates (--tls-folder, or --tls-cert, --tls-key and "
            "--tls-ca), listen on 127.0.0.1, or allow it with --insecure"
        )
    return danger


@asynccontextmanager
async def reminding(exposure: str | None, host: str) -> AsyncIterator[None]:
    """Logs it each minute."""
    task = asyncio.create_task(_remind(exposure, host), name="reminder of --insecure") if exposure else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


class HealthService(Protocol):
    async def set_serving(self, serving: bool, service: str = "") -> None: ...


@asynccontextmanager
async def showing_health(
    health: HealthService, exposure: str | None, problems: Callable[[], Sequence[str]]
) -> AsyncIterator[None]:
    """Keeps both names in the health service."""
    if exposure:
        await health.set_serving(True, INSECURE_NAME)
    await health.set_serving(not problems(), CREDENTIALS_NAME)
    task = asyncio.create_task(_follow(health, problems), name="health of the credentials")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _follow(health: HealthService, problems: Callable[[], Sequence[str]]) -> None:
    while True:
        await asyncio.sleep(LOOK_INTERVAL_S)
        await health.set_serving(not problems(), CREDENTIALS_NAME)


async def _remind(exposure: str, host: str) -> None:
    while True:
        _log.warning(f"{exposure} (--insecure)", host=host)
        await asyncio.sleep(REMINDER_INTERVAL_S)
