"""A replica takes the place of Redis's primary under load: in a cluster, and behind Sentinels.

Streams do not notice, and what ends from then on is stored by the new primary.
"""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from redis.crc import key_slot

from kvrelay.client import AsyncClient
from kvrelay.core.request_state import is_terminal
from kvrelay.errors import KvrelayError
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.state_store import StateStore
from kvrelay.testing import FaultCluster, wait_until
from kvrelay.testing.scenarios.lasting_load import ENGINE, REQUEST_SETTINGS, LastingLoad, compare_stored, make_requests
from tests.support import redis_deployments, sentinels
from tests.support.redis_fixtures import admin_of, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(540)]

FAILOVER_TIMEOUT_S = 120.0
DOWN_AFTER_MS = 2000
REDIS_TIMEOUT_MS = 2000
NUM_CLIENTS = 4
SETTINGS = {**REQUEST_SETTINGS, "keep_outputs": True}
REGISTRY_KEY = b"kvrelay:{registry}:leases"
"""Its primary is the one that ends: processes then also lose their leases' home."""


@dataclass
class Failover:
    """Of `primary`, to `replica`."""

    url: str
    primary: EmbeddedValkey
    replica: EmbeddedValkey
    by_hand: Callable[[], Awaitable[None]]
    ports: frozenset[int]
    """Of all servers, and of Sentinels."""

    async def by_death(self) -> None:
        os.kill(self.primary.pid, signal.SIGKILL)

    async def is_over(self) -> bool:
        try:
            async with admin_of(self.replica) as client:
                role: list[Any] = await client.execute_command("ROLE")
        except redis.exceptions.ConnectionError:  # Sentinels close all connections as they promote it
            return False
        return bool(role[0] == b"master")


@asynccontextmanager
async def in_cluster(folder: Path) -> AsyncIterator[Failover]:
    async with redis_deployments.cluster(folder, num_replicas=3, node_timeout_ms=DOWN_AFTER_MS) as started:
        number = key_slot(REGISTRY_KEY) * 3 // redis_deployments.NUM_SLOTS
        replica = started.servers[3 + number]

        async def by_hand() -> None:
            async with admin_of(replica) as client:
                await client.execute_command("CLUSTER", "FAILOVER")

        ports = frozenset(server.port for server in started.servers)
        yield Failover(started.url, started.servers[number], replica, by_hand, ports)


@asynccontextmanager
async def behind_sentinels(folder: Path) -> AsyncIterator[Failover]:
    async with sentinels.watched(folder, down_after_ms=DOWN_AFTER_MS) as started:

        async def by_hand() -> None:
            async with started.sentinels[0].client() as client:
                await eventually(partial(sentinels.fails_over, client), FAILOVER_TIMEOUT_S)

        ports = frozenset([each.port for each in started.servers] + [each.port for each in started.sentinels])
        yield Failover(started.url, started.servers[0], started.servers[1], by_hand, ports)


DEPLOYMENTS: dict[str, Callable[[Path], AbstractAsyncContextManager[Failover]]] = {
    "cluster": in_cluster,
    "sentinel": behind_sentinels,
}


@pytest.mark.parametrize("deployment", list(DEPLOYMENTS))
async def test_no_stream_notices_that_a_replica_takes_the_place_of_a_dead_primary(
    deployment: str, tmp_path: Path
) -> None:
    await check_failovers(DEPLOYMENTS[deployment], tmp_path, num_tokens=60, by_death=True)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("by_death", [True, False], ids=["dead", "by hand"])
@pytest.mark.parametrize("deployment", list(DEPLOYMENTS))
async def test_no_stream_notices_a_failover_under_lasting_load(deployment: str, tmp_path: Path, by_death: bool) -> None:
    await check_failovers(DEPLOYMENTS[deployment], tmp_path, num_tokens=300, by_death=by_death)


async def check_failovers(
    deployment: Callable[[Path], AbstractAsyncContextManager[Failover]],
    folder: Path,
    *,
    num_tokens: int,
    by_death: bool,
) -> None:
    async with deployment(folder) as failover:
        server = {"redis_url": failover.url, "redis_timeout_ms": REDIS_TIMEOUT_MS}
        rig = FaultCluster(requests=SETTINGS, engine=ENGINE, server=server, redis_ports=failover.ports)
        async with rig as cluster, cluster.client() as client:
            load = LastingLoad(cluster, make_requests(2 * NUM_CLIENTS, num_tokens=num_tokens), NUM_CLIENTS)
            ended_before: list[int] = []

            async def harm() -> None:
                await until_ended(load, NUM_CLIENTS)
                await (failover.by_death if by_death else failover.by_hand)()
                await wait_until(failover.is_over, "the replica is the primary", FAILOVER_TIMEOUT_S)
                await wait_until(partial(is_well, client), "the gateway keeps state again", FAILOVER_TIMEOUT_S)
                ended_before.append(len(load.report.outcomes))
                await until_ended(load, NUM_CLIENTS)

            report = await load.run(harm)
            report.check()
            assert len(report.outcomes) >= ended_before[0] + NUM_CLIENTS
            await cluster.check()
            # Of what ended earlier, the dead primary may have kept the end to itself.
            report.outcomes = report.outcomes[ended_before[0] :]
            stored = await compare_stored(cluster, report, all_are_kept=True)
            assert (stored["stored_wrong"], stored["not_stored"]) == (0, 0), stored
            assert stored["stored"] >= NUM_CLIENTS
        await check_nothing_runs(failover.url)


async def until_ended(load: LastingLoad, num_more: int) -> None:
    """As many more requests have ended; each client then runs another."""
    num_before = len(load.report.outcomes)

    async def is_so() -> bool:
        return len(load.report.outcomes) >= num_before + num_more

    await wait_until(is_so, f"{num_more} more requests have ended", FAILOVER_TIMEOUT_S)


async def is_well(client: AsyncClient) -> bool:
    try:
        return not (await client.cluster()).degraded
    except KvrelayError:
        return False


async def check_nothing_runs(url: str) -> None:
    """Every request that the new primary knows has ended."""
    async with RedisConnection(url, 20_000) as connection:
        store = StateStore(connection, "test")
        token, num_seen = "", 0
        while True:
            page = await store.list_requests(100, token)
            num_seen += len(page.requests)
            running = [request.request_id for request in page.requests if not is_terminal(request.state)]
            assert not running
            token = page.next_page_token
            if not token:
                break
        assert num_seen >= NUM_CLIENTS
