"""Whether a process may listen on a host: others reach it only with credentials."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from kvrelay.errors import StartupError
from kvrelay.network.listening import is_loopback

INSECURE_NAME = "kvrelay.v1.Insecure"
"""Not a service: its health serves where everybody has all rights."""
CREDENTIALS_NAME = "kvrelay.v1.Credentials"
"""Likewise: its health does not serve while a changed file of credentials cannot be used."""
LOOK_INTERVAL_S = 0.5
REMINDER_INTERVAL_S = 60.0

_log = structlog.get_logger(__name__)


def is_exposed(host: str, *, is_protected: bool, insecure: bool, needed: str) -> bool:
    """Whether everybody who reaches the host has all rights: StartupError then, unless `insecure`."""
    if is_protected or is_loopback(host):
        return False
    if not insecure:
        raise StartupError(
            f"whoever reaches {host} would have all rights: give {needed}, listen on 127.0.0.1, "
            "or allow it with --insecure"
        )
    return True


@asynccontextmanager
async def reminding(exposed: bool, host: str) -> AsyncIterator[None]:
    """Logs each minute that the process is exposed."""
    task = asyncio.create_task(_remind(host), name="reminder of --insecure") if exposed else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


class HealthService(Protocol):
    async def set_serving(self, serving: bool, service: str = "") -> None: ...


@asynccontextmanager
async def showing_health(
    health: HealthService, exposed: bool, problems: Callable[[], Sequence[str]]
) -> AsyncIterator[None]:
    """Keeps both names in the health service."""
    if exposed:
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


async def _remind(host: str) -> None:
    while True:
        _log.warning("everybody who reaches this process has all rights (--insecure)", host=host)
        await asyncio.sleep(REMINDER_INTERVAL_S)
