"""A whole cluster as processes on this machine, for `serve all`, `demo` and tests.

Gateways' gRPC ports and all HTTP ports are chosen before the start. Named ports go to the first
gateway.
"""

import asyncio
import contextlib
import secrets
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from kvrelay.client import Cluster
from kvrelay.cluster.member_settings import (
    SettingsT,
    WorkerSettingsT,
    of_another,
    operator_prover,
    operator_tls,
    with_certificates,
    with_cluster_key,
    with_cores,
    with_peers,
    with_server,
)
from kvrelay.cluster.readiness import ask_cluster, describe_connections, has_all
from kvrelay.config.redis_settings import IN_THE_URL
from kvrelay.config.settings import DecodeSettings, GatewaySettings, OpenAISettings, PrefillSettings
from kvrelay.config.sources import environment_for
from kvrelay.errors import StartupError
from kvrelay.network.listening import ANY_HOST, bind_sockets, check_port
from kvrelay.network.own_address import LOOPBACK, address_here
from kvrelay.openai_frontend import readiness, smg
from kvrelay.own_packages import own_module_command
from kvrelay.runtime.child_process import ChildProcess, LineSink
from kvrelay.runtime.supervision import describe_exit, keep_running
from kvrelay.runtime.watchdog import WatchdogListener
from kvrelay.security.cluster_key import ClusterKeyFile
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import check_redis_at

Role = Literal["gateway", "prefill", "decode", "openai"]
WorkerRoleName = Literal["prefill", "decode"]
AnySettings = GatewaySettings | PrefillSettings | DecodeSettings

GATEWAY_NAME = "gateway"
VALKEY_NAME = "valkey"
OPENAI_NAME = "openai"

_STOP_GRACE_S = 3.2
"""Until SIGKILL. Everything must be gone within 5 s."""
_DRAIN_TIMEOUT_MS = 1500
_POLL_INTERVAL_S = 0.1
_MAX_FOLDER_BYTES = 80
"""Keeps a socket's path below the system's 108 bytes."""


def serve_command(role: Role) -> list[str]:
    return own_module_command("kvrelay.cli", "serve", role)


@dataclass(slots=True)
class _Member:
    """Every restart replaces `process`."""

    name: str
    role: Role
    environment: dict[str, str]
    process: ChildProcess
    life: WatchdogListener | None = None
    """None without supervision."""
    num_restarts: int = 0


@dataclass(slots=True)
class LocalCluster:
    """`async with LocalCluster() as cluster: ... cluster.gateway_address`.

    Start it on the main thread (see `kvrelay.runtime.parent_death`).

    Args:
        gateway: port 0 takes a free one. Gateways after the first always do.
        redis_url: None starts an embedded Valkey.
        restart: restart processes that end. The gateway restores Valkey's data.
        hang_timeout_s: with `restart`, kill a process after this silence.
        command, adjust: for tests.
        tls_folder: has a certificate for each role; see `kvrelay certs dev`.
    """

    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    num_gateways: int = 1
    prefill: Sequence[PrefillSettings] = (PrefillSettings(),)
    decode: Sequence[DecodeSettings] = (DecodeSettings(),)
    redis_url: str | None = None
    openai: OpenAISettings | None = None
    restart: bool = False
    hang_timeout_s: float = 10.0
    startup_timeout_s: float = 180.0
    on_line: LineSink = lambda _name, _line: None
    command: Callable[[Role], Sequence[str]] = serve_command
    adjust: Callable[[str, AnySettings], AnySettings] = lambda _name, settings: settings
    tls_folder: str | None = None
    valkey: EmbeddedValkey | None = field(default=None, init=False)
    gateway_address: str = field(default="", init=False)
    """host:port of the first gateway."""
    gateway_addresses: tuple[str, ...] = field(default=(), init=False)
    http_addresses: dict[str, str] = field(default_factory=dict, init=False)
    """host:port by process name."""
    openai_address: str = field(default="", init=False)
    _asked_addresses: tuple[str, ...] = field(default=(), init=False)
    """Where gateways answer this cluster's own questions."""
    _members: dict[str, _Member] = field(default_factory=dict, init=False)
    _supervisors: list[asyncio.Task[None]] = field(default_factory=list, init=False)
    _sockets: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)
    _held_ports: list[socket.socket] = field(default_factory=list, init=False)
    _life_folder: str | None = field(default=None, init=False)
    _cluster_key: ClusterKeyFile | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Waits until everything is connected. On failure stops everything.

        Raises:
            StartupError: a process ended or was late; has the end of its output.
        """
        try:
            if self.openai is not None:
                smg.check_installed()
                # Fails now if it is taken, and not after minutes.
                check_port(self.gateway.server.host, self.openai.port, "--openai-port")
            self._cluster_key = ClusterKeyFile()
            if self.redis_url is None:
                self.valkey = EmbeddedValkey()
                await self.valkey.start()
                self.redis_url = self.valkey.url
            else:
                await check_redis_at(self.redis_url)
            for number in range(self.num_gateways):
                await self._add_gateway(number)
            for prefill_settings in self.prefill:
                await self._add_worker("prefill", prefill_settings)
            for decode_settings in self.decode:
                await self._add_worker("decode", decode_settings)
            await self.wait_until_ready()
            if self.openai is not None:
                await self._add_openai_front(self.openai)
        except BaseException:
            await self.stop()
            raise
        for member in self._members.values():
            self._supervise_member(member)
        if self.valkey is not None:
            self._supervise(VALKEY_NAME, self.valkey.wait, self.valkey.start_again)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL, Valkey last; takes at most 5 s. Idempotent."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(member.process.stop(_STOP_GRACE_S) for member in self._members.values()))
        for member in self._members.values():
            if member.life is not None:
                member.life.close()
        while self._held_ports:
            self._held_ports.pop().close()
        if self._sockets is not None:
            self._sockets.cleanup()
        self._sockets = self._life_folder = None
        if self._cluster_key is not None:
            self._cluster_key.remove()
        if self.valkey is not None:
            await self.valkey.stop()

    async def add_worker(self, settings: PrefillSettings | DecodeSettings) -> str:
        """Does not wait for the worker. Returns its name."""
        if isinstance(settings, PrefillSettings):
            member = await self._add_worker("prefill", settings)
        else:
            member = await self._add_worker("decode", settings)
        self._supervise_member(member)
        return member.name

    async def start_again(self, name: str) -> None:
        """Needed only without `restart`."""
        member = self._members[name]
        if member.life is not None:
            member.life.forget()
        member.process = await self._start_process(name, member.role, member.environment)
        member.num_restarts += 1

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """After SIGKILL, waits for the end."""
        process = self._members[name].process
        process.send_signal(number)
        if number == signal.SIGKILL:
            await process.wait()

    @property
    def names(self) -> list[str]:
        """gateway, gateway-1, ..., prefill-0, prefill-1, ..., decode-0, ..."""
        return list(self._members)

    def pid(self, name: str) -> int:
        return self._members[name].process.pid

    def num_restarts(self, name: str) -> int:
        return self._members[name].num_restarts

    def tail(self, name: str) -> str:
        return "\n".join(self._members[name].process.tail)

    def read_output(self, name: str, reading: bool) -> None:
        """Reads the output, or lets its pipe fill up until the next restart; for tests."""
        process = self._members[name].process
        if reading:
            process.read_again()
        else:
            process.stop_reading()

    async def wait_until_ready(self) -> Cluster:
        """Waits until every gateway has all workers. Returns the first one's view."""
        expected = {
            role: sum(member.role == role for member in self._members.values()) for role in ("prefill", "decode")
        }
        seen = "its gateway did not answer"
        tls = operator_tls(self.tls_folder, self.gateway.security.trust_domain)
        prover = operator_prover(self.gateway.security, self._cluster_key) if tls is None else None
        try:
            async with asyncio.timeout(self.startup_timeout_s):
                for address in reversed(self._asked_addresses):
                    while not has_all(cluster := await ask_cluster(address, tls, prover), expected):
                        self._raise_if_one_ended()
                        seen = seen if cluster is None else describe_connections(cluster)
                        await asyncio.sleep(_POLL_INTERVAL_S)
        except TimeoutError:
            message = f"the cluster was not ready within {self.startup_timeout_s:g} s: {seen}"
            raise StartupError(f"{message}\n{self._tails()}") from None
        assert cluster is not None, "all are there"
        return cluster

    async def _add_gateway(self, number: int) -> None:
        settings = self.gateway if number == 0 else of_another(self.gateway)
        settings = with_server(settings, port=self._hold_port(settings.server.host, settings.server.port, "--port"))
        if self.valkey is None and settings.security.cluster_key_file is None:  # then workers have no key
            settings = with_peers(settings, any_workers=True)
        if number == 0:
            self.gateway = settings
            self.gateway_address = address_here(settings.server.host, settings.server.port)
        address = address_here(settings.server.host, settings.server.port)
        self.gateway_addresses += (address,)
        if self.tls_folder is not None:
            peer_port = self._hold_port(
                settings.server.host, settings.peers.peer_port if number == 0 else 0, "--peer-port"
            )
            settings = with_peers(settings, peer_port=peer_port)
            address = address_here(settings.server.host, peer_port) if settings.has_peer_port else address
        self._asked_addresses += (address,)
        await self._add(GATEWAY_NAME if number == 0 else f"{GATEWAY_NAME}-{number}", "gateway", settings)

    async def _add_openai_front(self, settings: OpenAISettings) -> None:
        """Starts after the gateways, because it asks them for the model."""
        host = self.gateway.server.host
        port = self._hold_port(host, settings.port, "--openai-port")
        self.openai_address = address_here(host, port)
        changes = {"host": host, "port": port, "gateway": ",".join(self._asked_addresses)}
        settings = with_certificates(settings.model_copy(update=changes), self.tls_folder, "front")
        if self.gateway.security.takes_keys:
            settings = with_cluster_key(settings, self._cluster_key)
        environment = {"PYTHONUNBUFFERED": "1", **environment_for(settings)}
        process = await self._start_process(OPENAI_NAME, "openai", environment)
        self._members[OPENAI_NAME] = _Member(OPENAI_NAME, "openai", environment, process)
        ready = asyncio.create_task(readiness.wait_for_front(self.openai_address, settings.security.tls_ca))
        ended = asyncio.create_task(process.wait())
        done, waiting = await asyncio.wait(
            [ready, ended], timeout=self.startup_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in waiting:
            task.cancel()
        if ready not in done:
            raise StartupError(
                f"OpenAI's API did not answer on {self.openai_address}; its output:\n{self.tail(OPENAI_NAME)}"
            )

    async def _add_worker(self, role: WorkerRoleName, settings: WorkerSettingsT) -> _Member:
        number = sum(member.role == role for member in self._members.values())
        settings = with_cores(of_another(settings), len(self.prefill) + len(self.decode), self._num_workers())
        if self.valkey is not None and settings.server.host in ANY_HOST:
            # The Valkey is on loopback, so only this machine finds the worker.
            settings = with_server(settings, advertise_address=LOOPBACK)
        return await self._add(f"{role}-{number}", role, settings)

    def _num_workers(self) -> int:
        return sum(member.role != "gateway" for member in self._members.values())

    async def _add(self, name: str, role: Role, settings: SettingsT) -> _Member:
        drain_timeout_ms = min(settings.server.drain_timeout_ms, _DRAIN_TIMEOUT_MS)
        life = await self._listen(name) if self.restart else None
        socket_path = life.path if life is not None else settings.server.watchdog_socket
        changes = {"redis_url": self.redis_url, "drain_timeout_ms": drain_timeout_ms, "watchdog_socket": socket_path}
        changes |= dict.fromkeys(IN_THE_URL)
        settings = self._with_http_port(name, with_server(settings, **changes))
        settings = with_certificates(settings, self.tls_folder, role)
        if self.valkey is not None or role == "gateway":  # who joins a user's Redis has no key
            settings = with_cluster_key(settings, self._cluster_key)
        environment = {"PYTHONUNBUFFERED": "1", **environment_for(self.adjust(name, settings))}
        process = await self._start_process(name, role, environment)
        self._members[name] = _Member(name, role, environment, process, life)
        return self._members[name]

    def _with_http_port(self, name: str, settings: SettingsT) -> SettingsT:
        if settings.server.http_port is None:
            return settings
        port = self._hold_port(settings.server.host, settings.server.http_port, "--http-port")
        self.http_addresses[name] = address_here(settings.server.host, port)
        return with_server(settings, http_port=port)

    def _hold_port(self, host: str, port: int, flag: str) -> int:
        """Binds a port until the cluster stops, without listening; a free one for 0."""
        held = bind_sockets(host, port, flag)
        self._held_ports += held
        return int(held[0].getsockname()[1])

    async def _listen(self, name: str) -> WatchdogListener:
        if self._life_folder is None:
            self._life_folder = self._make_life_folder()
        life = WatchdogListener(f"{self._life_folder}/{name}")
        await life.open()
        return life

    def _make_life_folder(self) -> str:
        """For the sockets of signs of life. Abstract if no short path is writable."""
        with contextlib.suppress(OSError):  # no writable folder
            self._sockets = tempfile.TemporaryDirectory(prefix="kvrelay-")
            if len(self._sockets.name.encode()) <= _MAX_FOLDER_BYTES:
                return self._sockets.name
        return f"@kvrelay-{secrets.token_hex(16)}"

    async def _start_process(self, name: str, role: Role, environment: Mapping[str, str]) -> ChildProcess:
        process = ChildProcess(name, self._command_of(role), environment, self.on_line)
        await process.start()
        return process

    def _command_of(self, role: Role) -> Sequence[str]:
        return self.command(role) if role != "openai" else serve_command(role)

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

    def _supervise(
        self, name: str, wait: Callable[[], Awaitable[int]], start_again: Callable[[], Awaitable[None]]
    ) -> None:
        if self.restart:
            supervision = keep_running(name, wait, start_again, self.on_line)
            self._supervisors.append(asyncio.create_task(supervision, name=f"supervisor of {name}"))

    def _raise_if_one_ended(self) -> None:
        if self._supervisors:
            return  # it comes back
        for member in self._members.values():
            if member.process.exit_code is not None:
                ending = describe_exit(member.process.exit_code)
                raise StartupError(
                    f"{member.name} ended {ending} while starting; its output:\n{self.tail(member.name)}"
                )

    def _tails(self) -> str:
        return "\n".join(
            f"[{name}] {line}" for name, member in self._members.items() for line in list(member.process.tail)[-10:]
        )
