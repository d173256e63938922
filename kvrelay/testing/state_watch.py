"""Watches the moves of all requests' states in Redis as they are written, and whether each is along an allowed edge (I7).

Reads MONITOR, in which Redis shows every command that it carries out, those of scripts too: so it sees what is stored, whoever
stores it, and not what a gateway believes. Knows the names of the keys and fields, and nothing of gateways.
"""

import asyncio
import contextlib
import re
from dataclasses import dataclass

from kvrelay.request_state import RequestState, check_edge, is_terminal, reachable_states

_WRITE = re.compile(rb'\blua\] "HSET" "(kvrelay:\{[^"]*\}:request)" (.*)')
_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_FORGET = re.compile(rb'\] "(?:FLUSHALL|FLUSHDB|RESTORE)"', re.IGNORECASE)
_LONGEST_LINE_BYTES = 64 * 1024 * 1024
_RETRY_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class KnownState:
    """Where a request is, as last written."""

    state: RequestState
    attempt: int


class StateHistory:
    """What was written of every request, and what of it was not allowed. A function of the writes given to it."""

    def __init__(self) -> None:
        self._known: dict[str, KnownState] = {}
        self._lost: set[str] = set()
        """Keys of records that may have come back, as they are or from a dump, in a state that is not known here."""
        self.num_moves = 0
        """Moves seen, all of them along an allowed edge but for `violations`."""
        self.num_restored = 0
        """Records that their owner wrote again as a whole, which may leave states out that were lost."""
        self.violations: list[str] = []

    def note(self, key: str, fields: dict[str, str]) -> None:
        """A request's record was written.

        Args:
            key: of the record.
            fields: that were written, of which `state`, `attempt` and `create_time_ms` matter.
        """
        if "state" not in fields:
            return
        before = self._known.get(key)
        after = KnownState(RequestState(fields["state"]), int(fields.get("attempt", before.attempt if before else 1)))
        self._known[key] = after
        if after == before:
            return
        self.num_moves += 1
        is_whole = "create_time_ms" in fields
        self.num_restored += is_whole and before is not None
        if not self._is_allowed(key, before, after, is_whole):
            self.violations.append(f"{key} went from {before and (before.state.value, before.attempt)} to {after}")

    def forget(self) -> None:
        """Redis has lost something, or may have: what comes next is taken as it is."""
        self._lost.update(self._known)
        self._known.clear()

    def _is_allowed(self, key: str, before: KnownState | None, after: KnownState, is_whole: bool) -> bool:
        if before is None:
            return is_whole or key in self._lost
        if is_terminal(before.state):
            return False
        if not is_whole:
            return check_edge(before.state, before.attempt, after.state, after.attempt)
        return after.attempt > before.attempt or (
            after.attempt == before.attempt and after.state in reachable_states(before.state)
        )


class StateWatch:
    """Feeds a history from a server. `async with StateWatch("127.0.0.1", 6379) as watch: watch.history`"""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._task: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self.history = StateHistory()

    async def start(self) -> None:
        """Returns when it sees everything that is written from now on."""
        self._task = asyncio.create_task(self._watch(), name="watch of states")
        await self._connected.wait()

    async def stop(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                await self._read()
            self.history.forget()  # the server has ended, and its memory with it
            await asyncio.sleep(_RETRY_INTERVAL_S)

    async def _read(self) -> None:
        reader, writer = await asyncio.open_connection(*self._address, limit=_LONGEST_LINE_BYTES)
        try:
            writer.write(b"MONITOR\r\n")
            await writer.drain()
            while line := await reader.readline():
                self._connected.set()
                self._take(line)
        finally:
            writer.transport.abort()

    def _take(self, line: bytes) -> None:
        if match := _WRITE.search(line):
            words = [word.decode("utf-8", "replace") for word in _WORD.findall(match[2])]
            self.history.note(match[1].decode("utf-8", "replace"), dict(zip(words[::2], words[1::2], strict=False)))
        elif _FORGET.search(line[:200]):
            self.history.forget()
