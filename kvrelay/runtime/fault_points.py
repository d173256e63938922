"""Named steps at which a test can make its process fail. Off unless a setting says so.

The test and the process share a folder:

    fault-points-on       must exist, so that a stray variable cannot switch this on
    plan.json             what is armed; replaced as a whole, read again when changed
    reached.jsonl         a line per armed point reached, written before its action
    snapshot-N.json       answer to SIGUSR2: tasks and live objects

docs/guides/test-your-cluster.md lists the points.
"""

import asyncio
import contextlib
import gc
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import structlog

from kvrelay.errors import ConfigError, KvrelayError

MARKER_NAME = "fault-points-on"
PLAN_NAME = "plan.json"
REACHED_NAME = "reached.jsonl"
SNAPSHOT_NAME = "snapshot-{number}.json"

_POLL_INTERVAL_S = 0.0005
_OWN_PACKAGES = ("kvrelay.", "gateway.", "prefill_worker.", "decode_worker.")

_log = structlog.get_logger(__name__)


class InjectedFaultError(KvrelayError):
    """A test asked for it."""


class FaultAction(Enum):
    KILL = "kill"
    STOP = "stop"
    """SIGSTOP, until SIGCONT."""
    WAIT = "wait"
    """Until the point is disarmed, at most `wait_ms`."""
    RAISE = "raise"
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class ArmedPoint:
    """Fires from the `at`-th time on, `times` times, counted over restarts; None: always.

    Counts only subjects with `match` in their repr. Of several processes, the one that makes the
    file `claim` fires.
    """

    number: int
    name: str
    action: FaultAction
    at: int = 1
    times: int | None = 1
    match: str = ""
    wait_ms: int = 10_000
    claim: str | None = None


@dataclass(frozen=True, slots=True)
class ReachedPoint:
    number: int
    name: str
    count: int
    fired: bool
    pid: int
    time_s: float


def encode_plan(points: Sequence[ArmedPoint]) -> str:
    return json.dumps([asdict(point) | {"action": point.action.value} for point in points])


def decode_plan(text: str) -> list[ArmedPoint]:
    return [ArmedPoint(**fields | {"action": FaultAction(fields["action"])}) for fields in json.loads(text)]


def decode_reached(text: str) -> list[ReachedPoint]:
    """Ignores an incomplete last line, which a killed process may leave."""
    return [ReachedPoint(**json.loads(line)) for line in text.split("\n")[:-1]]


class FaultPlan:
    def __init__(self, folder: Path) -> None:
        self._plan_path = folder / PLAN_NAME
        self._folder = folder
        reached = folder / REACHED_NAME
        known = decode_reached(reached.read_text("utf-8")) if reached.exists() else []
        self._counts = Counter(point.number for point in known)
        self._descriptor = os.open(reached, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._version: tuple[int, int] | None = None
        self._points: list[ArmedPoint] = []
        self._num_snapshots = 0

    def reach(self, name: str, subjects: tuple[object, ...]) -> None:
        firing = []
        with self._lock:
            self._read_plan()
            for point in self._points:
                if point.name == name and (not point.match or any(point.match in repr(each) for each in subjects)):
                    firing += [point] if self._record(point) else []
        for point in firing:
            self._fire(point)

    def _record(self, point: ArmedPoint) -> bool:
        self._counts[point.number] = count = self._counts[point.number] + 1
        fires = count >= point.at and (point.times is None or count < point.at + point.times) and _has_claim(point)
        line = json.dumps(asdict(ReachedPoint(point.number, point.name, count, fires, os.getpid(), time.monotonic())))
        os.write(self._descriptor, line.encode() + b"\n")
        return fires

    def _fire(self, point: ArmedPoint) -> None:
        match point.action:
            case FaultAction.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # until the kernel acts
            case FaultAction.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case FaultAction.WAIT:
                self._wait(point)
            case FaultAction.RAISE:
                raise InjectedFaultError(f"{point.name} was made to fail by a test")
            case FaultAction.COUNT:
                pass

    def _wait(self, point: ArmedPoint) -> None:
        deadline_s = time.monotonic() + point.wait_ms / 1000
        while time.monotonic() < deadline_s:
            with self._lock:
                self._read_plan()
                if point not in self._points:
                    return
            time.sleep(_POLL_INTERVAL_S)

    def _read_plan(self) -> None:
        try:
            found = os.stat(self._plan_path)
        except FileNotFoundError:
            self._points = []
            return
        version = (found.st_mtime_ns, found.st_ino)
        if version != self._version:
            self._points = decode_plan(self._plan_path.read_text("utf-8"))
            self._version = version

    def write_snapshot(self) -> None:
        """Runs in the main thread, between two steps of its event loop."""
        self._num_snapshots += 1
        path = self._folder / SNAPSHOT_NAME.format(number=self._num_snapshots)
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps({"pid": os.getpid(), **_snapshot()}), "utf-8")
        scratch.rename(path)


_plan: FaultPlan | None = None


def fault_point(name: str, *subjects: object) -> None:
    """Marks a step. A test may match the repr of `subjects`, or have InjectedFaultError raised."""
    if _plan is not None:
        _plan.reach(name, subjects)


def enable_fault_points(folder: str | None) -> None:
    """Raises ConfigError when no test made the folder."""
    global _plan
    if folder is None:
        return
    if not (Path(folder) / MARKER_NAME).exists():
        raise ConfigError(
            f"fault_points is {folder}, which has no file {MARKER_NAME}: fault points are for tests only and let "
            "whoever can write to that folder kill this process; unset KVRELAY_FAULT_POINTS"
        )
    _plan = FaultPlan(Path(folder))
    with contextlib.suppress(ValueError):  # outside of the main thread there are no snapshots
        signal.signal(signal.SIGUSR2, lambda *_: _plan.write_snapshot() if _plan is not None else None)
    _log.warning(
        "FAULT POINTS ARE ON: this process can be killed and stopped by tests; never serve users with it", folder=folder
    )


def _has_claim(point: ArmedPoint) -> bool:
    if point.claim is None:
        return True
    try:
        os.close(os.open(point.claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _snapshot() -> Mapping[str, Any]:
    gc.collect()
    try:
        tasks = sorted(map(_name_of, asyncio.all_tasks()))
    except RuntimeError:  # no loop runs
        tasks = []
    classes = (type(each) for each in gc.get_objects())
    names = Counter(f"{each.__module__}.{each.__qualname__}" for each in classes if _is_own(each))
    return {"tasks": tasks, "objects": dict(names), "threads": sorted(thread.name for thread in threading.enumerate())}


def _name_of(task: "asyncio.Task[Any]") -> str:
    name = task.get_name()
    return str(getattr(task.get_coro(), "__qualname__", name)) if name.startswith("Task-") else name


def _is_own(kind: type) -> bool:
    return str(getattr(kind, "__module__", "")).startswith(_OWN_PACKAGES)
