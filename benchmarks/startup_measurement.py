"""One start of `kvrelay serve all` until its first token: how far each process got when, its
processor time and its memory.

Knows nothing of how that is shown.
"""

import asyncio
import contextlib
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvrelay.client import AsyncClient
from kvrelay.config.settings import BYTES_PER_MIB
from kvrelay.errors import KvrelayError, StartupError
from kvrelay.own_packages import own_module_command

PATIENCE_S = 300.0
CONNECT_POLL_S = 0.02
ASK_AGAIN_S = 0.1
STOP_GRACE_S = 10.0
WEIGHTS_FACTOR = 1.3
ALLOWANCE_BYTES = 500_000_000

OWN_NAME = "kvrelay"
_LINE = re.compile(r"(?P<name>[\w-]+) *\| (?P<text>.*)")
_EVENTS = re.compile(r"(?:^|\] )(model loaded|session with worker began|ready)\b")
_KV_MIB = re.compile(r"kv_mib=(\d+)")
_ROLES = ("gateway", "prefill", "decode", "valkey")
_WORKERS = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a process logged."""

    process: str
    event: str
    at_s: float
    """Since the command was run."""


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What a process had used when the first token was there and all was quiet again."""

    process: str
    role: str
    started_s: float
    """When it began, since the command was run."""
    cpu_s: float
    """Processor time of all its threads."""
    rss_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Start:
    """One start. Times in seconds since the command was run."""

    first_token_s: float
    ready_s: float
    events: tuple[Event, ...]
    processes: tuple[ProcessUse, ...]
    kv_pool_bytes: int
    """Of each worker."""

    def worker_bound_bytes(self, weight_bytes: int) -> int:
        """What a worker may hold: 1.3 times the weights, the KV pool and 500 MB."""
        return int(WEIGHTS_FACTOR * weight_bytes) + self.kv_pool_bytes + ALLOWANCE_BYTES

    def full_bytes(self, use: ProcessUse) -> int:
        """What a worker will hold when all of its pool was written to, or held while it loaded,
        whichever is more.
        """
        return max(use.peak_rss_bytes, use.rss_bytes + self.kv_pool_bytes)


def is_worker(use: ProcessUse) -> bool:
    """Whether it is a process that holds a model."""
    return use.role in _WORKERS


async def measure_start(arguments: Sequence[str], prompt: str) -> Start:
    """Starts a cluster, asks it until it answers, and ends it.

    Args:
        arguments: of `serve all`, without the port.
        prompt: text of the request.

    Raises:
        StartupError: it ended, or did not answer in time.
    """
    port = _free_port()
    command = own_module_command("kvrelay.cli", "serve", "all", "--port", str(port), *arguments)
    begin_s, begin_time_s = time.monotonic(), time.time()
    async with _running(command) as process:
        log = _Log(begin_s)
        reading = asyncio.create_task(log.read(process), name="log of serve all")
        async with asyncio.timeout(PATIENCE_S):
            first_token_s = await _until(_first_token(port, prompt), reading, log) - begin_s
            await _until(log.ready.wait(), reading, log)
        uses = _uses(process.pid, begin_time_s)
        process.send_signal(signal.SIGTERM)
        await reading
    ready_s = next(event.at_s for event in log.events if event.process == OWN_NAME)
    return Start(first_token_s, ready_s, tuple(log.events), uses, log.kv_pool_bytes)


class _Log:
    """What the cluster logs, with the time at which each line came."""

    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self.events: list[Event] = []
        self.tail: list[str] = []
        self.ready = asyncio.Event()
        self.kv_pool_bytes = 0

    async def read(self, process: asyncio.subprocess.Process) -> None:
        """Until the output ends."""
        assert process.stderr is not None
        async for raw in process.stderr:
            self._take(raw.decode("utf-8", "replace").rstrip())

    def _take(self, line: str) -> None:
        self.tail = [*self.tail[-20:], line]
        found = _LINE.match(line)
        event = found and _EVENTS.search(found["text"])
        if not found or not event:
            return
        self.events.append(Event(found["name"], event[1], time.monotonic() - self._begin_s))
        if kv_mib := _KV_MIB.search(found["text"]):
            self.kv_pool_bytes = int(kv_mib[1]) * BYTES_PER_MIB
        if found["name"] == OWN_NAME:
            self.ready.set()


@asynccontextmanager
async def _running(command: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
        async with asyncio.timeout(STOP_GRACE_S):
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _until(waiting: Coroutine[None, None, float | bool], reading: asyncio.Task[None], log: _Log) -> float:
    """The result, unless the cluster ends before it is there."""
    task = asyncio.create_task(waiting)
    try:
        await asyncio.wait([task, reading], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise StartupError("serve all ended while starting; its output:\n" + "\n".join(log.tail))
        return float(task.result())
    finally:
        task.cancel()


async def _first_token(port: int, prompt: str) -> float:
    """Asks again and again, as a user would that wants the first answer there is; when it came, in
    monotonic seconds.
    """
    while not _is_open(port):  # noqa: ASYNC110  (what is waited for is in another process)
        await asyncio.sleep(CONNECT_POLL_S)
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        while True:
            try:
                async for delta in client.generate(prompt, max_tokens=2, temperature=0):
                    if delta.tokens:
                        return time.monotonic()
            except KvrelayError:
                await asyncio.sleep(ASK_AGAIN_S)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _uses(pid: int, begin_time_s: float) -> tuple[ProcessUse, ...]:
    root = psutil.Process(pid)
    members = [(OWN_NAME, root), *((_role(child), child) for child in root.children(recursive=True))]
    numbers = dict.fromkeys((OWN_NAME, *_ROLES, ""), -1)
    uses = []
    for role, process in sorted(members, key=lambda member: member[1].create_time()):
        numbers[role] += 1
        name = f"{role}-{numbers[role]}" if role in _WORKERS else role
        times = process.cpu_times()
        rss_bytes = process.memory_info().rss
        use = ProcessUse(
            process=name,
            role=role,
            started_s=max(0.0, process.create_time() - begin_time_s),
            cpu_s=times.user + times.system,
            rss_bytes=rss_bytes,
            peak_rss_bytes=_peak_rss_bytes(process.pid) or rss_bytes,
        )
        uses.append(use)
    return tuple(uses)


def _role(process: psutil.Process) -> str:
    words = [Path(word).name for word in process.cmdline()]
    return next((role for role in _ROLES if any(word.startswith(role) for word in words)), "")


def _peak_rss_bytes(pid: int) -> int | None:
    """None where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None
