"""Checks that states in Redis move along allowed edges (I7).

Redis shows all commands with MONITOR, so this checks what is stored, not what a gateway believes.
"""

import asyncio
import contextlib
import re
from dataclasses import dataclass

from kvrelay.core.request_state import RequestState, check_edge, is_terminal, reachable_states

_WRITE = re.compile(rb'\blua\] "HSET" "(kvrelay:\{[^"]*\}:request)" (.*)')
_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_FORGET = re.compile(rb'\] "(?:FLUSHALL|FLUSHDB|RESTORE)"', re.IGNORECASE)
_LONGEST_LINE_BYTES = 64 * 1024 * 1024
_RETRY_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class KnownState:
    state: RequestState
    attempt: int


class StateHistory:
    """Pure."""

    def __init__(self) -> None:
        self._known: dict[str, KnownState] = {}
        self._lost: set[str] = set()
        """Keys that may come back in an unknown state."""
        self.num_moves = 0
        """Including `violations`."""
        self.num_restored = 0
        """Rewrites by owners, which may skip states."""
        self.violations: list[str] = []

    def on_write(self, key: str, fields: dict[str, str]) -> None:
        """Only `state`, `attempt` and `create_time_ms` matter."""
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
        """After a possible loss in Redis, any next state is allowed."""
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
    """Feeds `history` from a server that listens on TCP."""

    def __init__(self, host: str, port: int, password: str) -> None:
        self._address = (host, port)
        self._password = password
        self._task: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self.history = StateHistory()

    async def start(self) -> None:
        """Returns when it sees all further writes."""
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
            writer.write(f"AUTH {self._password}\r\nMONITOR\r\n".encode())
            await writer.drain()
            if not (await reader.readline()).startswith(b"+OK"):
                raise PermissionError("the server refuses the password")
            while line := await reader.readline():
                self._connected.set()
                self._take(line)
        finally:
            writer.transport.abort()

    def _take(self, line: bytes) -> None:
        if match := _WRITE.search(line):
            words = [word.decode("utf-8", "replace") for word in _WORD.findall(match[2])]
            self.history.on_write(match[1].decode("utf-8", "replace"), dict(zip(words[::2], words[1::2], strict=False)))
        elif _FORGET.search(line[:200]):
            self.history.forget()
