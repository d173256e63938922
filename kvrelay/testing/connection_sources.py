"""Finds the process at the other end of a connection, for the links of proxies."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvrelay.testing.process_files import owners_of_local_ports


@dataclass(slots=True)
class ConnectionSources:
    """One look at /proc answers all who wait: two hundred connections at once need few looks.

    Args:
        names: the names of processes by pid.
        other: names every other process.
    """

    names: Callable[[], Mapping[int, str]]
    other: str
    _waiting: list[tuple[int, asyncio.Future[str]]] = field(default_factory=list, init=False)
    _looking: asyncio.Task[None] | None = field(default=None, init=False)

    async def name_of(self, port: int) -> str:
        """The process with a connection from this local port. Always called on the same loop."""
        found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((port, found))
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="sources of connections")
        return await found

    async def _look(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            names = self.names()
            # In a thread: it takes milliseconds, which would delay all proxies.
            owners = await asyncio.to_thread(owners_of_local_ports, {port for port, _ in batch}, names)
            for port, found in batch:
                if not found.done():  # its connection may have ended
                    found.set_result(names[owners[port]] if port in owners else self.other)
        self._looking = None
