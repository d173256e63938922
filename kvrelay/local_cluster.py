"""A whole cluster on this machine: Valkey, gateways and workers as processes of their own. For `serve all`, `demo` and tests.

Owns the processes' lives and nothing of what they say to each other: it gives each its settings, waits until every gateway
reports all workers as connected, starts what ends by itself again if asked to, and leaves no process behind.

The gateways' ports are chosen before they start, since clients must know them, and so are ports for HTTP; workers listen on any
free port and register in Redis. A port that settings name is the first gateway's; where they name one for HTTP, all others
get free ones for it.
"""

import asyncio
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TypeVar

from kvrelay import openai_front
from kvrelay.child_process import ChildProcess, LineSink
from kvrelay.client import AsyncClient, Cluster, WorkerRole
from kvrelay.config import DecodeSettings, GatewaySettings, PrefillSettings
from kvrelay.core_set import available_cores, divide_cores, format_cores, machine_board_path
from kvrelay.embedded_valkey import EmbeddedValkey
from kvrelay.errors import KvrelayError, StartupError
from kvrelay.settings_sources import environment_for
from kvrelay.signs_of_life import LifeListener
from kvrelay.supervision import describe_exit, keep_running

Role = Literal["gateway", "prefill", "decode", "openai"]
WorkerRoleName = Literal["prefill", "decode"]
SettingsT = TypeVar("SettingsT", GatewaySettings, PrefillSettings, DecodeSettings)
WorkerSettingsT = TypeVar("WorkerSettingsT", PrefillSettings, DecodeSettings)
AnySettings = GatewaySettings | PrefillSettings | DecodeSettings

GATEWAY_NAME = "gateway"
VALKEY_NAME = "valkey"
OPENAI_NAME = "openai"

_STOP_GRACE_S = 3.2
"""From SIGTERM to SIGKILL: everything has to be gone within 5 s."""
_DRAIN_TIMEOUT_MS = 1500
_POLL_INTERVAL_S = 0.1
_OWN_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}
"""Where this machine reaches what listens on all addresses."""


def serve_command(role: Role) -> list[str]:
    """The command that runs a role with settings from its environment."""
    return [sys.executable, "-m", "kvrelay.cli", "serve", role]


@dataclass(slots=True)
class _Member:
    """One process of the cluster; `process` is replaced at every restart."""

    name: str
    role: Role
    environment: dict[str, str]
    process: ChildProcess
    life: LifeListener | None = None
    """Where its signs of life arrive; None when nobody looks."""
    num_restarts: int = 0


@dataclass(slots=True)
class LocalCluster:
    """`async with LocalCluster() as cluster: ... cluster.gateway_address`. Start it on the main thread (see `die_with_parent`).

    Args:
        gateway: settings of the gateways; port 0 takes a free one, and all but the first do anyway.
        num_gateways: gateway processes.
        prefill, decode: settings of each worker, one process for each.
        redis_url: an existing Redis; None starts an embedded Valkey.
        openai_port: where OpenAI's HTTP API is served, on the gateway's host; 0 takes a free port, None serves none.
        restart: start a process again when it ends by itself, the embedded Valkey too: the gateway restores what that has lost.
        hang_timeout_s: with `restart`, a process without a sign of life for so long is killed, and so started again.
        startup_timeout_s: most time until everything is connected.
        on_line: gets every line of every process.
        command: how a role is run; for tests with other programs.
        adjust: gets each process's name and settings, has the last word on them; for tests that put something in front of it.
    """

    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    num_gateways: int = 1
    prefill: Sequence[PrefillSettings] = (PrefillSettings(),)
    decode: Sequence[DecodeSettings] = (DecodeSettings(),)
    redis_url: str | None = None
    openai_port: int | None = None
    restart: bool = False
    hang_timeout_s: float = 10.0
    startup_timeout_s: float = 180.0
    on_line: LineSink = lambda _name, _line: None
    command: Callable[[Role], Sequence[str]] = serve_command
    adjust: Callable[[str, AnySettings], AnySettings] = lambda _name, settings: settings
    valkey: EmbeddedValkey | None = field(default=None, init=False)
    gateway_address: str = field(default="", init=False)
    """host:port of the first gateway."""
    gateway_addresses: tuple[str, ...] = field(default=(), init=False)
    """host:port of every gateway."""
    http_addresses: dict[str, str] = field(default_factory=dict, init=False)
    """host:port for HTTP of each process that has one, by the process's name."""
    openai_address: str = field(default="", init=False)
    """host:port of OpenAI's HTTP API, where it is served."""
    _members: dict[str, _Member] = field(default_factory=dict, init=False)
    _supervisors: list[asyncio.Task[None]] = field(default_factory=list, init=False)
    _sockets: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts everything and waits until it is connected; when that fails nothing is left running.

        Raises:
            StartupError: a process ended or did not get ready in time; has the end of its output.
        """
        try:
            if self.openai_port is not None:
                openai_front.check_installed()
                _choose_port(self.gateway.server.host, self.openai_port, "--openai-port")  # taken: better said now than later
            if self.redis_url is None:
                self.valkey = EmbeddedValkey()
                await self.valkey.start()
                self.redis_url = self.valkey.url
            for number in range(self.num_gateways):
                await self._add_gateway(number)
            for prefill_settings in self.prefill:
                await self._add_worker("prefill", prefill_settings)
            for decode_settings in self.decode:
                await self._add_worker("decode", decode_settings)
            await self.wait_until_ready()
            if self.openai_port is not None:
                await self._add_openai_front(self.openai_port)
        except BaseException:
            await self.stop()
            raise
        for member in self._members.values():
            self._supervise_member(member)
        if self.valkey is not None:
            self._supervise(VALKEY_NAME, self.valkey.wait, self.valkey.start_again)

    async def stop(self) -> None:
        """Ends everything within 5 s: SIGTERM to all at once, SIGKILL for what is left, Valkey last. Idempotent."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(member.process.stop(_STOP_GRACE_S) for member in self._members.values()))
        for member in self._members.values():
            if member.life is not None:
                member.life.close()
        if self._sockets is not None:
            self._sockets.cleanup()
            self._sockets = None
        if self.valkey is not None:
            await self.valkey.stop()

    async def add_worker(self, settings: PrefillSettings | DecodeSettings) -> str:
        """Starts one more worker, of the role that the settings are for, without waiting for it; its name."""
        if isinstance(settings, PrefillSettings):
            member = await self._add_worker("prefill", settings)
        else:
            member = await self._add_worker("decode", settings)
        self._supervise_member(member)
        return member.name

    async def start_again(self, name: str) -> None:
        """Starts a process anew that has ended, with the settings it had; without `restart`, which does so by itself."""
        member = self._members[name]
        if member.life is not None:
            member.life.forget()
        member.process = await self._start_process(name, member.role, member.environment)
        member.num_restarts += 1

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a process; after SIGKILL, waits for its end. With `restart` it comes back."""
        process = self._members[name].process
        process.send_signal(number)
        if number == signal.SIGKILL:
            await process.wait()

    @property
    def names(self) -> list[str]:
        """Names of all processes: gateway, gateway-1, ..., prefill-0, prefill-1, ..., decode-0, ..."""
        return list(self._members)

    def pid(self, name: str) -> int:
        """Process id of the named process's current run."""
        return self._members[name].process.pid

    def num_restarts(self, name: str) -> int:
        """How often the named process was started again."""
        return self._members[name].num_restarts

    def tail(self, name: str) -> str:
        """The end of the named process's output."""
        return "\n".join(self._members[name].process.tail)

    def read_output(self, name: str, reading: bool) -> None:
        """Whether the named process's output is read, or left until its pipe is full; for tests. Its next run is read anyway."""
        process = self._members[name].process
        if reading:
            process.read_again()
        else:
            process.stop_reading()

    async def wait_until_ready(self) -> Cluster:
        """Waits until every gateway serves and is connected to as many workers as were started; what the first says then.

        Raises:
            StartupError: as `start`.
        """
        expected = {role: sum(member.role == role for member in self._members.values()) for role in ("prefill", "decode")}
        seen = "its gateway did not answer"
        try:
            async with asyncio.timeout(self.startup_timeout_s):
                for address in reversed(self.gateway_addresses):
                    async with AsyncClient(address) as client:
                        while not _has_all(cluster := await _ask(client), expected):
                            self._raise_if_one_ended()
                            seen = seen if cluster is None else _connected(cluster)
                            await asyncio.sleep(_POLL_INTERVAL_S)
        except TimeoutError:
            message = f"the cluster was not ready within {self.startup_timeout_s:g} s: {seen}"
            raise StartupError(f"{message}\n{self._tails()}") from None
        assert cluster is not None, "all are there"
        return cluster

    async def _add_gateway(self, number: int) -> None:
        settings = self.gateway if number == 0 else _of_another(self.gateway)
        settings = _with_server(settings, port=_choose_port(settings.server.host, settings.server.port, "--port"))
        if number == 0:
            self.gateway = settings
            self.gateway_address = _dialled(settings.server.host, settings.server.port)
        self.gateway_addresses += (_dialled(settings.server.host, settings.server.port),)
        await self._add(GATEWAY_NAME if number == 0 else f"{GATEWAY_NAME}-{number}", "gateway", settings)

    async def _add_openai_front(self, port: int) -> None:
        """After the gateways are ready: it asks them for the model when it starts."""
        self.openai_port = port = _choose_port(self.gateway.server.host, port, "--openai-port")
        self.openai_address = _dialled(self.gateway.server.host, port)
        environment = openai_front.environment()
        process = await self._start_process(OPENAI_NAME, "openai", environment)
        self._members[OPENAI_NAME] = _Member(OPENAI_NAME, "openai", environment, process)
        ready = asyncio.create_task(openai_front.wait_until_ready(self.openai_address))
        ended = asyncio.create_task(process.wait())
        done, waiting = await asyncio.wait([ready, ended], timeout=self.startup_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if ready not in done:
            raise StartupError(f"smg did not answer on {self.openai_address}; its output:\n{self.tail(OPENAI_NAME)}")

    async def _add_worker(self, role: WorkerRoleName, settings: WorkerSettingsT) -> _Member:
        number = sum(member.role == role for member in self._members.values())
        settings = self._with_cores(_of_another(settings))
        return await self._add(f"{role}-{number}", role, settings)

    def _with_cores(self, settings: WorkerSettingsT) -> WorkerSettingsT:
        """Engines that share a machine divide its cores, or each slows the other down; idle ones are lent."""
        if settings.engine.num_threads is not None or settings.engine.cores is not None:
            return settings
        num_workers = len(self.prefill) + len(self.decode)
        number = sum(member.role != "gateway" for member in self._members.values())
        shares = divide_cores(available_cores(), num_workers)
        if number >= num_workers or not shares[number]:
            return _with_engine(settings, num_threads=max(1, len(available_cores()) // max(2, num_workers)))
        board = settings.engine.core_board or machine_board_path()
        return _with_engine(settings, cores=format_cores(shares[number]), core_board=board)

    async def _add(self, name: str, role: Role, settings: SettingsT) -> _Member:
        drain_timeout_ms = min(settings.server.drain_timeout_ms, _DRAIN_TIMEOUT_MS)
        life = await self._listen(name) if self.restart else None
        socket_path = life.path if life is not None else settings.server.watchdog_socket
        changes = {"redis_url": self.redis_url, "drain_timeout_ms": drain_timeout_ms, "watchdog_socket": socket_path}
        settings = self._with_http_port(name, _with_server(settings, **changes))
        environment = {"PYTHONUNBUFFERED": "1", **environment_for(self.adjust(name, settings))}
        process = await self._start_process(name, role, environment)
        self._members[name] = _Member(name, role, environment, process, life)
        return self._members[name]

    def _with_http_port(self, name: str, settings: SettingsT) -> SettingsT:
        if settings.server.http_port is None:
            return settings
        port = _choose_port(settings.server.host, settings.server.http_port, "--http-port")
        self.http_addresses[name] = _dialled(settings.server.host, port)
        return _with_server(settings, http_port=port)

    async def _listen(self, name: str) -> LifeListener:
        if self._sockets is None:
            self._sockets = tempfile.TemporaryDirectory(prefix="kvrelay-")
        life = LifeListener(f"{self._sockets.name}/{name}")
        await life.open()
        return life

    async def _start_process(self, name: str, role: Role, environment: Mapping[str, str]) -> ChildProcess:
        process = ChildProcess(name, self._command_of(role), environment, self.on_line)
        await process.start()
        return process

    def _command_of(self, role: Role) -> Sequence[str]:
        if role != "openai":
            return self.command(role)
        assert self.openai_port is not None, "asked for"
        metrics_port = _choose_port("127.0.0.1", 0, "a port for smg's metrics")
        return openai_front.command(self.gateway.server.host, self.openai_port, metrics_port, self.gateway_addresses)

    def _supervise_member(self, member: _Member) -> None:
        async def start_again() -> None:
            await self.start_again(member.name)

        self._supervise(member.name, lambda: member.process.wait(), start_again)
        if member.life is not None:
            watching = member.life.watch(self.hang_timeout_s, lambda silence_s: self._kill_hung(member, silence_s))
            self._supervisors.append(asyncio.create_task(watching, name=f"watch of {member.name}"))

    def _kill_hung(self, member: _Member, silence_s: float) -> None:
        self.on_line(member.name, f"gave no sign of life for {silence_s:.0f} s: killed")
        member.process.send_signal(signal.SIGKILL)

    def _supervise(self, name: str, wait: Callable[[], Awaitable[int]], start_again: Callable[[], Awaitable[None]]) -> None:
        if self.restart:
            task = asyncio.create_task(keep_running(name, wait, start_again, self.on_line), name=f"supervisor of {name}")
            self._supervisors.append(task)

    def _raise_if_one_ended(self) -> None:
        if self._supervisors:
            return  # it comes back
        for member in self._members.values():
            if member.process.exit_code is not None:
                ending = describe_exit(member.process.exit_code)
                raise StartupError(f"{member.name} ended {ending} while starting; its output:\n{self.tail(member.name)}")

    def _tails(self) -> str:
        return "\n".join(f"[{name}] {line}" for name, member in self._members.items() for line in list(member.process.tail)[-10:])


async def _ask(client: AsyncClient) -> Cluster | None:
    try:
        if not (await client.health(timeout_s=2.0)).serving:
            return None
        return await client.cluster(timeout_s=2.0)
    except KvrelayError:
        return None  # not up yet


def _num_connected(cluster: Cluster, role: str) -> int:
    return sum(worker.connected and worker.role is WorkerRole(role) for worker in cluster.workers)


def _has_all(cluster: Cluster | None, expected: Mapping[str, int]) -> bool:
    return cluster is not None and all(_num_connected(cluster, role) >= number for role, number in expected.items())


def _connected(cluster: Cluster) -> str:
    counts = (f"{_num_connected(cluster, role)} {role}" for role in ("prefill", "decode"))
    return f"its gateway was connected to {' and '.join(counts)} workers"


def _with_server(settings: SettingsT, **changes: object) -> SettingsT:
    return settings.model_copy(update={"server": settings.server.model_copy(update=changes)})


def _of_another(settings: SettingsT) -> SettingsT:
    """The settings for one more process: ports that they name are taken already."""
    http_port = None if settings.server.http_port is None else 0
    return _with_server(settings, port=0, http_port=http_port, advertise_address=None)


def _with_engine(settings: WorkerSettingsT, **changes: object) -> WorkerSettingsT:
    return settings.model_copy(update={"engine": settings.engine.model_copy(update=changes)})


def _choose_port(host: str, port: int, flag: str) -> int:
    """A port that can be listened on: the given one, or a free one for 0.

    Raises:
        StartupError: it is taken; `flag` is what chooses another one.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the server itself does: connections of a server that has just ended do not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = f"Free the port, or choose another with {flag} (0 takes a free one)"
            raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}. {advice}") from None
        chosen_port: int = probe.getsockname()[1]
        return chosen_port


def _dialled(host: str, port: int) -> str:
    """host:port by which this machine reaches what listens there."""
    return f"{_OWN_HOSTS.get(host, host)}:{port}"
