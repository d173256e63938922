"""Whether a process may listen on a host: others reach it only with credentials."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from kvrelay.errors import StartupError
from kvrelay.network.listening import is_loopback

INSECURE_NAME = "kvrelay.v1.Insecure"
"""Not a service: its health serves where everybody has all rights."""
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


async def _remind(host: str) -> None:
    while True:
        _log.warning("everybody who reaches this process has all rights (--insecure)", host=host)
        await asyncio.sleep(REMINDER_INTERVAL_S)
