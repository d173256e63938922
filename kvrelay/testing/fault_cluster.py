"""A cluster of real processes with fault points, each behind a proxy.

    client ──► proxy ──► gateway ──► proxy ──► decode-0        prefill-0 ──► proxy ──► decode-0
                            └─────► proxy ──► valkey

Processes advertise their proxies, so that all traffic passes one, also KV: it goes over gRPC by
default.
"""

import contextlib
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvrelay.client import AsyncClient, Cluster, WorkerInfo, WorkerRole
from kvrelay.cluster.local_cluster import AnySettings, LocalCluster, Role, serve_command
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import (
    DecodeSettings,
    EngineSettings,
    GatewaySettings,
    PrefillSettings,
    RequestSettings,
    ServerSettings,
    TransferSettings,
)
from kvrelay.errors import KvrelayError
from kvrelay.network.listening import bind_sockets
from kvrelay.runtime.child_process import LineSink
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.testing.connection_sources import ConnectionSources
from kvrelay.testing.faults import FIRE_TIMEOUT_S, ArmedFault, FaultControl
from kvrelay.testing.invariants import Baseline, check_at_rest, take_baseline
from kvrelay.testing.process import FaultProcess
from kvrelay.testing.proxy import FaultProxy
from kvrelay.testing.security import Security, TenantsClient
from kvrelay.testing.state_watch import StateWatch
from kvrelay.testing.tiny_model import make_tiny_llama
from kvrelay.testing.waiting import wait_until

CLIENT = "client"
"""Source of connections from outside the cluster."""
READY_TIMEOUT_S = 90.0
REDIS_TIMEOUT_MS = 2000
"""More than the default: a busy test machine is no fault."""


@dataclass(slots=True)
class FaultCluster:
    """`async with FaultCluster() as cluster:` on the main thread. Linux only.

    Args:
        model: folder or name; None makes a tiny model.
        engine, requests, server, transfer: changes to those settings.
        prefill_engines, decode_engines: changes to single workers' engine settings, by number.
        secured: switches on everything in `kvrelay.testing.security`.
        redis_ports: of another Redis in `server`.
        on_line: called with process name and line of its output.
        command: called at each start of a process; may start another version.
    """

    num_gateways: int = 1
    num_prefill: int = 1
    num_decode: int = 1
    model: Path | str | None = None
    engine: Mapping[str, object] = field(default_factory=dict)
    requests: Mapping[str, object] = field(default_factory=dict)
    server: Mapping[str, object] = field(default_factory=dict)
    transfer: Mapping[str, object] = field(default_factory=dict)
    prefill_engines: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    decode_engines: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    restart: bool = False
    secured: bool = False
    redis_ports: frozenset[int] = frozenset()
    valkey_mib: int = 256
    on_line: LineSink = lambda _name, _line: None
    command: Callable[[Role], Sequence[str]] = serve_command
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="kvrelay-faults-")), init=False)
    valkey: EmbeddedValkey = field(init=False)
    valkey_proxy: FaultProxy = field(init=False)
    state_watch: StateWatch = field(init=False)
    """Sees every stored state from the start."""
    processes: dict[str, FaultProcess] = field(default_factory=dict, init=False)
    """By name: gateway, gateway-1, ..., prefill-0, ..., decode-0, ..."""
    baseline: Baseline | None = field(default=None, init=False)
    security: Security | None = field(default=None, init=False)
    """None unless `secured`."""
    _cluster: LocalCluster = field(init=False)
    _sources: ConnectionSources = field(init=False)
    _held_ports: list[socket.socket] = field(default_factory=list, init=False)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns when all are connected; StartupError has the end of a failed process's output."""
        self.security = Security(self.folder) if self.secured else None
        users = () if self.security is None else self.security.valkey_options
        self.valkey = EmbeddedValkey(self.valkey_mib, on_tcp=True, more_options=users)
        self._sources = ConnectionSources(self._names_by_pid, CLIENT)
        try:
            await self.valkey.start()
            self.state_watch = StateWatch("127.0.0.1", self.valkey.port, self.valkey.password)
            await self.state_watch.start()
            self.valkey_proxy = FaultProxy("127.0.0.1", self.valkey.port, self._sources.name_of)
            await self.valkey_proxy.start()
            self._cluster = self._build_cluster()
            for name in self._names():
                await self._add_process(name)
            await self._cluster.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends all processes, even stopped ones. Idempotent."""
        for process in self.processes.values():
            process.control.disarm_all()
            process.proxy.heal()
        if hasattr(self, "_cluster"):
            await self._cluster.stop()
        while self._held_ports:
            self._held_ports.pop().close()
        for process in self.processes.values():
            await process.proxy.stop()
        if hasattr(self, "valkey_proxy"):
            await self.valkey_proxy.stop()
        if hasattr(self, "state_watch"):
            await self.state_watch.stop()
        await self.valkey.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- processes --------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> FaultProcess:
        """A process by its name."""
        return self.processes[name]

    def of_role(self, role: str) -> list[FaultProcess]:
        """All processes of gateway, prefill or decode."""
        return [process for name, process in self.processes.items() if name.startswith(role)]

    def arm_one_of(
        self, role: str, point: str, action: FaultAction = FaultAction.KILL, **arguments: Any
    ) -> "OneOfFault":
        """Arms a point in all processes of a role, as `FaultProcess.arm`; it fires in the first
        only.
        """
        claim = str(self.folder / f"claim-{uuid.uuid4().hex}")
        return OneOfFault({each: each.arm(point, action, claim=claim, **arguments) for each in self.of_role(role)})

    @property
    def addresses(self) -> list[str]:
        """host:port of each gateway's proxy."""
        return [process.proxy.address for process in self.of_role("gateway")]

    def client(self, *gateways: str) -> AsyncClient:
        """A client of the named gateways, by default of all."""
        return self.connect([self[name].proxy.address for name in gateways] or self.addresses)

    def connect(self, addresses: Sequence[str]) -> AsyncClient:
        """A client of some of `addresses`. A request goes with the key of its tenant if there are keys."""
        return AsyncClient(addresses) if self.security is None else TenantsClient(addresses, self.security)

    @property
    def redis_url(self) -> str:
        """The Valkey itself, not its proxy."""
        return self.valkey.url

    def name_of_worker(self, info: WorkerInfo) -> str:
        """Name of the process that a gateway knows as this worker."""
        return next(name for name, process in self.processes.items() if process.proxy.address == info.address)

    async def connected_workers(self, client: AsyncClient) -> set[str]:
        """Names of workers that take jobs from the asked gateway."""
        workers = (await client.cluster(timeout_s=2.0)).workers
        return {self.name_of_worker(worker) for worker in workers if worker.connected and not worker.load.draining}

    async def worker_of(
        self, client: AsyncClient, request_id: str, role: WorkerRole = WorkerRole.DECODE
    ) -> FaultProcess:
        """The process that runs the request now."""
        request = await client.get_request(request_id)
        wanted = request.decode_worker_id if role is WorkerRole.DECODE else request.prefill_worker_id
        workers = (await client.cluster()).workers
        return self[next(self.name_of_worker(worker) for worker in workers if worker.worker_id == wanted)]

    # --- states -----------------------------------------------------------------------------------

    async def wait_until_ready(self, timeout_s: float = READY_TIMEOUT_S) -> Cluster:
        """Waits until all running processes are connected; returns one gateway's view."""
        seen: list[Cluster] = []
        for gateway in self.of_role("gateway"):
            if gateway.is_running:
                async with self.client(gateway.name) as client:
                    await wait_until(partial(self._is_ready, client, seen), f"{gateway.name} is ready", timeout_s)
        assert seen, "a gateway runs"
        return seen[-1]

    async def _is_ready(self, client: AsyncClient, seen: list[Cluster]) -> bool:
        try:
            if not (await client.health(timeout_s=2.0)).serving:
                return False
            cluster = await client.cluster(timeout_s=2.0)
        except KvrelayError:
            return False
        seen.append(cluster)
        connected = {worker.address for worker in cluster.workers if worker.connected and not worker.load.draining}
        workers = [process for process in self.processes.values() if not process.name.startswith("gateway")]
        return all((process.proxy.address in connected) == process.is_running for process in workers)

    async def restart_ended(self) -> None:
        """Restarts ended processes, and waits until all are connected."""
        for process in self.processes.values():
            if not process.is_running:
                await process.start_again()
        await self.wait_until_ready()

    def heal(self) -> None:
        """Ends every fault of every link, and disarms every point."""
        self.valkey_proxy.heal()
        for process in self.processes.values():
            process.proxy.heal()
            process.control.disarm_all()

    async def take_baseline(self) -> None:
        """Remembers what the cluster holds at rest, for `check`."""
        self.baseline = await take_baseline(self)

    async def check(self, timeout_s: float = 30.0) -> None:
        """Raises AssertionError if anything of a request is left; see
        `kvrelay.testing.invariants`.
        """
        await check_at_rest(self, timeout_s)

    # --- below: how it is built -------------------------------------------------------------------

    def _names(self) -> list[str]:
        gateways = ["gateway", *(f"gateway-{number}" for number in range(1, self.num_gateways))]
        prefill = [f"prefill-{number}" for number in range(self.num_prefill)]
        return [*gateways, *prefill, *(f"decode-{number}" for number in range(self.num_decode))]

    async def _add_process(self, name: str) -> None:
        # Held until the end, or another program may have it when the process starts again.
        (held,) = bind_sockets("127.0.0.1", 0, name)
        self._held_ports.append(held)
        proxy = FaultProxy("127.0.0.1", held.getsockname()[1], self._sources.name_of)
        await proxy.start()
        control = FaultControl(name, self.folder / name)
        self.processes[name] = FaultProcess(name, self._cluster, control, proxy)

    def _build_cluster(self) -> LocalCluster:
        return LocalCluster(
            gateway=GatewaySettings(
                server=ServerSettings(port=0),
                requests=RequestSettings.model_validate(dict(self.requests)),
                security=SecuritySettings() if self.security is None else self.security.of_gateways,
            ),
            num_gateways=self.num_gateways,
            prefill=[
                PrefillSettings(
                    engine=self._engine(self.prefill_engines.get(number, {})),
                    transfer=TransferSettings.model_validate({"transfer_transport": "grpc", **self.transfer}),
                )
                for number in range(self.num_prefill)
            ],
            decode=[
                DecodeSettings(engine=self._engine(self.decode_engines.get(number, {})))
                for number in range(self.num_decode)
            ],
            redis_url=f"redis://:{self.valkey.password}@{self.valkey_proxy.address}/0",
            restart=self.restart,
            startup_timeout_s=READY_TIMEOUT_S * 2,
            on_line=self.on_line,
            command=self.command,
            adjust=self._adjust,
            tls_folder=None if self.security is None else str(self.security.certificates),
        )

    def _engine(self, changes: Mapping[str, object]) -> EngineSettings:
        values: dict[str, object] = {
            "dtype": "float32",
            "device": "cpu",
            "num_threads": 1,
            "num_kv_blocks": 256,
            "block_size": 8,
        }
        return EngineSettings.model_validate({**values, "model": self._model(), **self.engine, **changes})

    def _model(self) -> str:
        if self.model is None:
            self.model = make_tiny_llama()
        return str(self.model)

    def _adjust(self, name: str, settings: AnySettings) -> AnySettings:
        process = self.processes[name]
        if settings.server.port:  # the cluster chose a gateway's port
            process.proxy.port_of_target = settings.server.port
        changes: dict[str, Any] = {
            "redis_timeout_ms": REDIS_TIMEOUT_MS,
            **self.server,
            "port": process.proxy.port_of_target,
            "advertise_address": process.proxy.address,
            "fault_points": str(process.control.folder),
        }
        settings = settings.model_copy(update={"server": settings.server.model_copy(update=changes)})
        if self.security is None:
            return settings
        return self.security.applied(name, settings, self.valkey_proxy.address)

    def _names_by_pid(self) -> dict[int, str]:
        names = {}
        for name in list(self.processes):
            with contextlib.suppress(KeyError):  # not started yet
                names[self._cluster.pid(name)] = name
        return names


@dataclass(slots=True)
class OneOfFault:
    faults: Mapping[FaultProcess, ArmedFault]

    @property
    def num_fired(self) -> int:
        return sum(fault.num_fired for fault in self.faults.values())

    async def wait_until_fired(self, timeout_s: float = FIRE_TIMEOUT_S) -> FaultProcess:
        """Returns the process in which it happened."""
        name = next(iter(self.faults.values())).point.name
        await wait_until(lambda: self.num_fired > 0, f"{name} fires in one of {len(self.faults)} processes", timeout_s)
        return next(process for process, fault in self.faults.items() if fault.num_fired)

    def disarm(self) -> None:
        for fault in self.faults.values():
            fault.disarm()
