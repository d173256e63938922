"""The test's side of `kvrelay.runtime.fault_points`."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.runtime.fault_points import (
    MARKER_NAME,
    PLAN_NAME,
    REACHED_NAME,
    SNAPSHOT_NAME,
    ArmedPoint,
    FaultAction,
    ReachedPoint,
    decode_reached,
    encode_plan,
)
from kvrelay.testing.waiting import wait_until

FIRE_TIMEOUT_S = 30.0
SNAPSHOT_TIMEOUT_S = 30.0


@dataclass(slots=True)
class ArmedFault:
    """A point that is armed in one process."""

    point: ArmedPoint
    control: "FaultControl" = field(repr=False)

    def reached(self) -> list[ReachedPoint]:
        """Every time the point was reached."""
        return self.control.reached(self.point.number)

    @property
    def num_fired(self) -> int:
        """How often the fault happened."""
        return sum(each.fired for each in self.reached())

    async def wait_until_fired(self, times: int = 1, timeout_s: float = FIRE_TIMEOUT_S) -> None:
        """Raises AssertionError when the fault does not happen in time."""
        where = f"{self.point.name} fires in {self.control.name}"
        await wait_until(lambda: self.num_fired >= times, where, timeout_s)

    def disarm(self) -> None:
        """Ends the fault; a thread that waits at the point goes on."""
        self.control.disarm(self.point.number)

    def __enter__(self) -> "ArmedFault":
        return self

    def __exit__(self, *error: object) -> None:
        self.disarm()


class FaultControl:
    """The folder that a process shares with the test."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._points: dict[int, ArmedPoint] = {}
        self._next_number = 1
        self._num_read_bytes = 0
        self._reached: dict[int, list[ReachedPoint]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER_NAME).touch()

    def arm(
        self,
        point: str,
        action: FaultAction = FaultAction.KILL,
        *,
        at: int = 1,
        times: int | None = 1,
        match: str = "",
        wait_ms: int = 10_000,
        claim: str | None = None,
    ) -> ArmedFault:
        armed = ArmedPoint(self._next_number, point, action, at, times, match, wait_ms, claim)
        self._next_number += 1
        self._points[armed.number] = armed
        self._write()
        return ArmedFault(armed, self)

    def disarm(self, number: int) -> None:
        if self._points.pop(number, None) is not None:
            self._write()

    def disarm_all(self) -> None:
        self._points.clear()
        self._write()

    def reached(self, number: int) -> list[ReachedPoint]:
        """Reads what is new: the file grows with every step while a point is armed."""
        path = self.folder / REACHED_NAME
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._num_read_bytes)
                lines = file.read().rpartition(b"\n")[0]
            if lines:
                self._num_read_bytes += len(lines) + 1
                for each in decode_reached(lines.decode() + "\n"):
                    self._reached.setdefault(each.number, []).append(each)
        return list(self._reached.get(number, ()))

    async def snapshot(self, pid: int) -> Mapping[str, Any]:
        """`tasks`, numbers of live `objects` by class, `threads`; AssertionError without an
        answer.
        """
        for old in self.folder.glob(SNAPSHOT_NAME.format(number="*")):
            old.unlink()
        os.kill(pid, signal.SIGUSR2)
        found: list[Path] = []

        def written() -> bool:
            found[:] = self.folder.glob(SNAPSHOT_NAME.format(number="*"))
            return bool(found)

        await wait_until(written, f"{self.name} answers SIGUSR2", SNAPSHOT_TIMEOUT_S)
        snapshot: Mapping[str, Any] = json.loads(found[0].read_text("utf-8"))
        return snapshot

    def _write(self) -> None:
        scratch = self.folder / f"{PLAN_NAME}.part"
        scratch.write_text(encode_plan(list(self._points.values())), "utf-8")
        scratch.rename(self.folder / PLAN_NAME)
