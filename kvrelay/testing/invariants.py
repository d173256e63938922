"""Checks a cluster at rest: nothing of ended requests is left (I3), each has an end (I6), reached
along allowed edges (I7). A secured one keeps tenants apart.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis.asyncio

from kvrelay.client import AsyncClient
from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.errors import KvrelayError
from kvrelay.state.redis_connection import MAX_CONNECTIONS, MAX_FOLLOWERS
from kvrelay.testing.process_files import kinds_of_descriptors
from kvrelay.testing.tenant_checks import check_tenants
from kvrelay.testing.waiting import wait_until

if TYPE_CHECKING:
    from kvrelay.testing.fault_cluster import FaultCluster
    from kvrelay.testing.process import FaultProcess

# At rest no process has an object of these classes.
REQUEST_CLASSES = (
    "prefill_worker.kv_sender.KVSender",
    "prefill_worker.service.PushTarget",
    "decode_worker.kv_receiver._IncomingPush",
    "decode_worker.receiving.write_grants.WriteGrant",
    "decode_worker.receiving.kv_reassembly.KVReassembly",
    "kvrelay.kv_cache.block_manager.BlockTable",
    "kvrelay.worker.sequence.TokenSequence",
    "decode_worker.scheduling.running_sequence.RunningSequence",
)
MAX_READERS = 1
"""gRPC keeps the last call, and with it an OutputReader, until the next one."""
REQUEST_TASKS = ("push", "takeover", "request")  # how names of a request's tasks begin
ORPHANS_TIMEOUT_S = 20.0  # requests of a dead gateway end two leases later
MAX_MORE_DESCRIPTORS = 8  # renewed sessions, and sockets that the kernel still holds
# Counted apart, because a process keeps as many as it once needed.
MAX_REDIS_CONNECTIONS = MAX_CONNECTIONS + 1 + MAX_FOLLOWERS


@dataclass(frozen=True, slots=True)
class Baseline:
    """What each process holds at rest, by process id."""

    descriptors: Mapping[int, int]
    """Without connections to Redis."""
    resident_bytes: Mapping[int, int]


async def take_baseline(cluster: "FaultCluster") -> Baseline:
    running = [process for process in cluster.processes.values() if process.is_running]
    return Baseline(
        {process.pid: _num_own_descriptors(cluster, process) for process in running},
        {process.pid: process.resident_bytes() for process in running},
    )


async def check_at_rest(cluster: "FaultCluster", timeout_s: float) -> None:
    """Waits for all invariants; AssertionError says which are violated."""
    serving: set[str] = set()  # SIGUSR2 would end a process that is just starting
    for gateway in cluster.of_role("gateway"):
        if gateway.is_running:
            async with cluster.client(gateway.name) as client:
                await _check_workers(client, timeout_s)
                serving |= {gateway.name} | await cluster.connected_workers(client)
    # Each collects its garbage first: it may hold connections to other processes.
    await asyncio.gather(*(cluster[name].snapshot() for name in serving))
    await asyncio.gather(*(_check_process(cluster, name, timeout_s) for name in sorted(serving)))
    await _check_redis(cluster, timeout_s)
    if cluster.security is not None:
        await check_tenants(cluster, cluster.security, timeout_s)
    violations = cluster.state_watch.history.violations
    assert not violations, f"{len(violations)} moves that are not allowed: {'; '.join(violations[:5])}"


async def _check_workers(client: AsyncClient, timeout_s: float) -> None:
    problems = ["no gateway answered"]

    async def at_rest() -> bool:
        problems[:] = await _problems_of_workers(client)
        return not problems

    await _wait(at_rest, problems, timeout_s)


async def _problems_of_workers(client: AsyncClient) -> list[str]:
    try:
        cluster = await client.cluster(timeout_s=2.0)
    except KvrelayError as error:
        return [error.message]
    problems = [f"{request.request_id} is {request.state.value}" for request in cluster.running_requests]
    for worker in cluster.workers:
        load = worker.load
        if not worker.connected:
            continue
        if load.num_running or load.num_waiting or load.num_used_blocks:
            problems.append(
                f"{worker.worker_id}: {load.num_running} running, {load.num_waiting} waiting, "
                f"{load.num_used_blocks} used blocks"
            )
        if load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks != load.num_blocks:
            problems.append(f"{worker.worker_id}: free + cached + used is not total: {load}")
    return problems


async def _check_process(cluster: "FaultCluster", name: str, timeout_s: float) -> None:
    problems: list[str] = []

    async def at_rest() -> bool:
        problems[:] = _problems_of_snapshot(name, await cluster[name].snapshot()) + _problems_of_descriptors(
            cluster, name
        )
        return not problems

    await _wait(at_rest, problems, timeout_s)


def _problems_of_snapshot(name: str, snapshot: Mapping[str, Any]) -> list[str]:
    objects = snapshot["objects"]
    problems = [f"{name}: {objects[each]} {each} are left" for each in REQUEST_CLASSES if objects.get(each)]
    num_readers = objects.get("gateway.streaming.readers.OutputReader", 0)
    problems += [f"{name}: {num_readers} readers of outputs are left"] if num_readers > MAX_READERS else []
    return problems + [
        f"{name}: the task {task!r} is left" for task in snapshot["tasks"] if task.startswith(REQUEST_TASKS)
    ]


def _problems_of_descriptors(cluster: "FaultCluster", name: str) -> list[str]:
    process, baseline = cluster[name], cluster.baseline
    num_connections = process.num_connections_to(cluster.valkey_proxy.port)
    if num_connections > MAX_REDIS_CONNECTIONS:
        return [f"{name}: {num_connections} connections to Redis"]
    before = baseline.descriptors.get(process.pid) if baseline is not None else None
    now = _num_own_descriptors(cluster, process)
    if before is None or now <= before + MAX_MORE_DESCRIPTORS:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds_of_descriptors(process.pid).items()))
    links = ", ".join(f"{link.num_open} of {link.source}" for link in process.proxy.links())
    return [
        f"{name}: {now} descriptors without those to Redis, {before} at the beginning: {kinds}; connections to it: "
        f"{links}"
    ]


def _num_own_descriptors(cluster: "FaultCluster", process: "FaultProcess") -> int:
    ports = {cluster.valkey_proxy.port, *cluster.redis_ports}
    return process.num_descriptors() - sum(map(process.num_connections_to, ports))


async def _check_redis(cluster: "FaultCluster", timeout_s: float) -> None:
    problems: list[str] = []

    async def at_rest() -> bool:
        problems[:] = await problems_of_redis(cluster.redis_url)
        return not problems

    await _wait(at_rest, problems, max(timeout_s, ORPHANS_TIMEOUT_S))


async def problems_of_redis(url: str) -> list[str]:
    """Keys without an end, and requests without a final state."""
    problems = []
    async with redis.asyncio.Redis.from_url(
        url, protocol=2, decode_responses=True, encoding_errors="replace"
    ) as client:
        async for key in client.scan_iter(match="kvrelay:*", count=1000):
            if await client.pttl(key) == -1:
                problems.append(f"the key {key} has no TTL")
            if await client.type(key) == "hash":
                state = await client.hget(key, "state")
                if state is not None and not is_terminal(RequestState(str(state))):
                    problems.append(f"{key} is {state!s}")
    return problems


async def _wait(condition: Any, problems: list[str], timeout_s: float) -> None:
    try:
        await wait_until(condition, "rest", timeout_s)
    except AssertionError:
        raise AssertionError(f"not at rest within {timeout_s:g} s: {'; '.join(problems[:10])}") from None
