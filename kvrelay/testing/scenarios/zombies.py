"""Processes stand still until others give them up, and then resume as zombies.

Harm would show in a client's tokens, in another request's block or in Redis.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError
from kvrelay.testing.fault_cluster import CLIENT, FaultCluster
from kvrelay.testing.process import FaultProcess
from kvrelay.testing.scenarios.lasting_load import ENGINE, REQUEST_SETTINGS, LastingLoad, compare_stored, make_requests
from kvrelay.testing.waiting import wait_until

LEASE_MS = 2000
GIVEN_UP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 300.0
"""Long, because one process of each kind is always stopped."""
MAX_ATTEMPTS = 64
"""High, because workers are lost all the time."""


async def zombies(num_clients: int = 8, num_tokens: int = 300, num_stops: int = 200) -> dict[str, Any]:
    """Stops workers and gateways until they are given up, and resumes them. One of each kind at
    once.
    """
    async with FaultCluster(
        num_gateways=2,
        num_prefill=2,
        num_decode=3,
        requests=REQUEST_SETTINGS | {"max_attempts": MAX_ATTEMPTS},
        engine=ENGINE,
        server={"lease_ms": LEASE_MS},
    ) as cluster:
        requests = make_requests(8 * num_clients, num_tokens=num_tokens, resumable=True, timeout_s=REQUEST_TIMEOUT_S)
        load = LastingLoad(cluster, requests, num_clients)
        stops = Stops(load, num_stops)
        await load.run(stops.run)
        await cluster.wait_until_ready()
        await cluster.check()
        stored = await compare_stored(cluster, load.report)
    return {**load.figures(), **stored, "stops": stops.counts.total(), "stops_by_role": dict(stops.counts)}


class Stops:
    """Makes zombies under a load, on at least two processes of each kind."""

    def __init__(self, load: LastingLoad, num_stops: int) -> None:
        self.counts: Counter[str] = Counter()
        """Zombies so far, by role."""
        self._load = load
        self._cluster = load.cluster
        self._num_left = num_stops
        self._clients: dict[FaultProcess, AsyncClient] = {}
        self._missing = ""
        """Why the last gateway was not given up yet."""

    async def run(self) -> None:
        self._clients = {gateway: self._cluster.client(gateway.name) for gateway in self._cluster.of_role("gateway")}
        try:
            async with asyncio.TaskGroup() as group:
                for role in ("decode", "prefill", "gateway"):
                    group.create_task(self._stop_in_turn(role, self._cluster.of_role(role)))
        finally:
            for client in self._clients.values():
                await client.close()

    async def _stop_in_turn(self, role: str, victims: Sequence[FaultProcess]) -> None:
        for victim in itertools.cycle(victims):
            if self._num_left == 0:
                return
            self._num_left -= 1
            await (self._make_zombie_gateway(victim) if role == "gateway" else self._make_zombie_worker(victim))
            self.counts[role] += 1

    async def _make_zombie_worker(self, victim: FaultProcess) -> None:
        await self._stop_until(victim, lambda: self._is_connected_nowhere(victim))
        await self._wait(lambda: self._is_connected_everywhere(victim), f"{victim.name} is back")

    async def _make_zombie_gateway(self, victim: FaultProcess) -> None:
        """Its clients lose it too, as behind a load balancer."""
        gateway_id = (await self._clients[victim].cluster()).gateway_id
        await self._stop_until(
            victim, lambda: self._is_taken_over(gateway_id), lambda: victim.link_from(CLIENT).close()
        )
        await self._wait(lambda: self._has_workers(victim), f"{victim.name} is back")

    async def _stop_until(
        self,
        victim: FaultProcess,
        given_up: Callable[[], Awaitable[bool]],
        when_stopped: Callable[[], object] = lambda: None,
    ) -> None:
        await victim.stop()
        try:
            when_stopped()
            await self._wait(given_up, f"{victim.name} is given up")
            assert victim.state == "T", "no other process has continued it"
        finally:
            await victim.resume()

    async def _wait(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        async def is_so() -> bool:
            try:
                return await condition()
            except KvrelayError:
                return False  # the asked gateway has just been stopped

        try:
            await wait_until(is_so, what, GIVEN_UP_TIMEOUT_S)
        except AssertionError as error:
            missing = self._missing or "nothing is missing"
            after = f"after {self.counts.total()} stops; of the gateway stopped last: {missing}"
            raise AssertionError(f"{error}, {after}") from None

    def _running_gateways(self) -> list[AsyncClient]:
        return [client for gateway, client in self._clients.items() if gateway.state != "T"]

    async def _connections(self, victim: FaultProcess) -> list[bool]:
        """Whether the worker has a session, for each running gateway."""
        seen = [await client.cluster(timeout_s=2.0) for client in self._running_gateways()]
        return [
            any(worker.connected for worker in cluster.workers if worker.address == victim.proxy.address)
            for cluster in seen
        ]

    async def _is_connected_nowhere(self, victim: FaultProcess) -> bool:
        return not any(await self._connections(victim))

    async def _is_connected_everywhere(self, victim: FaultProcess) -> bool:
        return all(await self._connections(victim))

    async def _is_taken_over(self, gateway_id: str) -> bool:
        (other,) = self._running_gateways()
        if any(gateway.gateway_id == gateway_id for gateway in (await other.cluster(timeout_s=2.0)).gateways):
            self._missing = "it has its lease"
            return False
        active = (await other.list_requests(page_size=1000, active_only=True, timeout_s=2.0)).requests
        left = [each for each in active if each.gateway_id == gateway_id and each.tenant in self._load.tenants_waiting]
        tenants = {each.tenant for each in left}
        self._missing = "; ".join(
            f"{each.request_id} of {each.tenant!r} is {each.state.value} {'there' if each in left else 'elsewhere'}"
            for each in active
            if each.tenant in tenants
        )
        return not left

    async def _has_workers(self, gateway: FaultProcess) -> bool:
        workers = (await self._clients[gateway].cluster(timeout_s=2.0)).workers
        connected = {worker.address for worker in workers if worker.connected}
        return all(
            process.proxy.address in connected
            for process in self._cluster.processes.values()
            if not process.name.startswith("gateway") and process.state != "T"
        )
