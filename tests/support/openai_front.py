"""The front with a real smg, before gateways with fake workers, in the test's event loop."""

import asyncio
import functools
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

import gateway.main
import gateway.workers.sessions
from kvrelay.config.security_settings import PeerSettings, SecuritySettings
from kvrelay.config.settings import GatewaySettings, OpenAISettings, RequestSettings, ServerSettings
from kvrelay.network.rpc import create_channel
from kvrelay.openai_frontend import main as front_main
from kvrelay.openai_frontend import readiness
from kvrelay.openai_frontend.relay import running_relays
from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.security.keys import digest_of
from kvrelay.security.principal import Role
from kvrelay.security.role_names import server_name
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc
from tests.gateway.conftest import LEASE_MS, eventually
from tests.support.fake_workers import FakeCluster
from tests.support.guarded_cluster import CachingDecodeWorker, Metadata, as_caller

ALICE, BOB, OPERATOR, FRONT = "alice", "bob", "operator", "front"
"""Keys have these names."""
TENANTS = {ALICE: "alice", BOB: "b\u00f6b & co"}
START_TIMEOUT_S = 110.0
PLAN = CertificatePlan("kvrelay.local")


@dataclass(frozen=True)
class Behind:
    """What gateways behind the front ask callers for."""

    keys: bool = False
    certificates: bool = False

    def __str__(self) -> str:
        names = [name for name in ("keys", "certificates") if getattr(self, name)]
        return " and ".join(names) or "nothing"


def write_keys(path: Path, *clients: str, **limits: dict[str, int]) -> None:
    """`limits` by the client's name."""
    entries: list[dict[str, Any]] = [
        {"id": name, "sha256": digest_of(name), "tenant": TENANTS[name], "limits": limits.get(name, {})}
        for name in clients
    ]
    entries.append({"id": OPERATOR, "sha256": digest_of(OPERATOR), "roles": ["operator"]})
    entries.append({"id": FRONT, "sha256": digest_of(FRONT), "tenant": "own", "roles": ["front"]})
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump({"keys": entries}))
    new.replace(path)


@dataclass
class RunningGateway:
    """`address` is where the front asks."""

    address: str
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub"
    metadata: Metadata
    """Of an operator."""
    task: "asyncio.Task[None]"
    stop: asyncio.Event

    async def requests(self) -> list[pb.RequestInfo]:
        """Of all tenants."""
        return list((await self.stub.ListRequests(pb.ListRequestsRequest(), metadata=self.metadata)).requests)

    async def tenants(self) -> set[str]:
        return {request.tenant for request in await self.requests()}


@dataclass
class Front:
    folder: Path
    url: str = ""
    gateways: list[RunningGateway] = field(default_factory=list)
    workers: FakeCluster = field(default_factory=FakeCluster)
    relays: list[str] = field(default_factory=list)
    """Addresses that smg dials."""

    @property
    def decode(self) -> CachingDecodeWorker:
        worker = self.workers.workers[-1]
        assert isinstance(worker, CachingDecodeWorker)
        return worker

    @property
    def keys_file(self) -> Path:
        return self.folder / "keys.yaml"

    def sdk(self, key: str) -> AsyncOpenAI:
        return sdk_of(self.url, key, str(self.folder / "tls/ca.pem") if self.url.startswith("https") else None)


def sdk_of(url: str, key: str, ca: str | None = None) -> AsyncOpenAI:
    """OpenAI's client, which trusts this CA for HTTPS."""
    http = None if ca is None else DefaultAsyncHttpxClient(verify=ssl.create_default_context(cafile=ca))
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=START_TIMEOUT_S, http_client=http)


def certificate_of(folder: Path, role: str) -> SecuritySettings:
    files = {"tls_cert": f"{role}.pem", "tls_key": f"{role}.key", "tls_ca": "ca.pem"}
    return SecuritySettings.model_validate({name: str(folder / file) for name, file in files.items()})


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@asynccontextmanager
async def running_front(
    folder: Path, behind: Behind, *, num_gateways: int = 1, **limits: dict[str, int]
) -> AsyncIterator[Front]:
    """`limits` are those of keys, by their names."""
    front = Front(folder)
    write_keys(front.keys_file, ALICE, BOB, **limits)
    if behind.certificates:
        make_certificates(folder / "tls", PLAN)
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # Fake workers speak plain text.
        patch.setattr(gateway.workers.sessions, "create_channel", lambda address, **options: create_channel(address))
        valkey = await stack.enter_async_context(EmbeddedValkey())
        connection = await stack.enter_async_context(RedisConnection(valkey.url, timeout_ms=20_000))
        await _add_workers(front, connection, stack)
        for _ in range(num_gateways):
            front.gateways.append(await _start_gateway(front, behind, valkey.url, stack))
        for each in front.gateways:
            await eventually(functools.partial(_is_connected, each))
        await _start_front(front, behind, stack)
        yield front


async def _add_workers(front: Front, connection: RedisConnection, stack: AsyncExitStack) -> None:
    stack.push_async_callback(front.workers.stop)
    prefill, decode = await front.workers.add_prefill(), CachingDecodeWorker(front.workers)
    await decode.start()
    front.workers.workers.append(decode)
    registry = MemberRegistry(connection, LEASE_MS)
    for worker in (prefill, decode):
        await stack.enter_async_context(registry.lease(worker.member))


async def _start_gateway(front: Front, behind: Behind, redis_url: str, stack: AsyncExitStack) -> RunningGateway:
    port, peer_port = free_ports(2)
    security = certificate_of(front.folder / "tls", "gateway") if behind.certificates else SecuritySettings()
    if behind.keys:
        security = security.model_copy(update={"keys_file": str(front.keys_file)})
    settings = GatewaySettings(
        server=ServerSettings(
            port=port, redis_url=redis_url, lease_ms=LEASE_MS, drain_timeout_ms=100, redis_timeout_ms=20_000
        ),
        requests=RequestSettings(local_prefill_tokens=0, worker_wait_ms=5000),
        security=security,
        peers=PeerSettings(peer_port=peer_port),
    )
    stop = asyncio.Event()
    task = asyncio.create_task(gateway.main.serve(settings, stop))
    stack.push_async_callback(_end, task, stop)
    asked = f"127.0.0.1:{peer_port if behind.keys and behind.certificates else port}"
    channel = await stack.enter_async_context(create_channel(asked, credentials=_of_operator(front, behind)))
    metadata = as_caller(OPERATOR) if behind.keys else ()
    return RunningGateway(asked, inference_pb2_grpc.InferenceServiceStub(channel), metadata, task, stop)


def _of_operator(front: Front, behind: Behind) -> ChannelCredentials | None:
    if not behind.certificates:
        return None
    tls = front.folder / "tls"
    authorities, key, certificate = ((tls / name).read_bytes() for name in ("ca.pem", "operator.key", "operator.pem"))
    made = grpc.ssl_channel_credentials(authorities, key, certificate)
    return ChannelCredentials(made, server_name(Role.GATEWAY, PLAN.trust_domain), b"")


async def _start_front(front: Front, behind: Behind, stack: AsyncExitStack) -> None:
    (port,) = free_ports(1)
    security = certificate_of(front.folder / "tls", "front") if behind.certificates else SecuritySettings()
    (front.folder / "front.key").write_text(FRONT)
    settings = OpenAISettings(
        port=port,
        gateway=",".join(each.address for each in front.gateways),
        gateway_key_file=str(front.folder / "front.key") if behind == Behind(keys=True) else None,
        security=security.model_copy(update={"keys_file": str(front.keys_file)}),
    )

    @asynccontextmanager
    async def noted(*arguments: Any) -> AsyncIterator[list[str]]:
        async with running_relays(*arguments) as front.relays:
            yield front.relays

    stack.enter_context(pytest.MonkeyPatch.context()).setattr(front_main, "running_relays", noted)
    stop = asyncio.Event()
    task = asyncio.create_task(front_main.serve(settings, stop))
    stack.push_async_callback(_end, task, stop)
    ready = asyncio.create_task(readiness.wait_for_front(f"127.0.0.1:{port}", security.tls_ca))
    async with asyncio.timeout(START_TIMEOUT_S):
        await asyncio.wait([ready, task], return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if task.done():
        task.result()
    front.url = f"{'https' if behind.certificates else 'http'}://127.0.0.1:{port}"


async def _end(task: "asyncio.Task[None]", stop: asyncio.Event) -> None:
    """A task that was cancelled by the test is over."""
    stop.set()
    async with asyncio.timeout(START_TIMEOUT_S):
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _is_connected(asked: RunningGateway) -> bool:
    cluster = await asked.stub.GetCluster(pb.GetClusterRequest(), metadata=asked.metadata)
    return sum(worker.connected for worker in cluster.workers) == 2
