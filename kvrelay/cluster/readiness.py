"""Whether a gateway is connected to all started workers."""

from collections.abc import Mapping

from kvrelay.client import AsyncClient, Cluster, WorkerRole
from kvrelay.errors import KvrelayError


async def ask_cluster(client: AsyncClient) -> Cluster | None:
    try:
        if not (await client.health(timeout_s=2.0)).serving:
            return None
        return await client.cluster(timeout_s=2.0)
    except KvrelayError:
        return None  # not up yet


def _num_connected(cluster: Cluster, role: str) -> int:
    return sum(worker.connected and worker.role is WorkerRole(role) for worker in cluster.workers)


def has_all(cluster: Cluster | None, expected: Mapping[str, int]) -> bool:
    return cluster is not None and all(_num_connected(cluster, role) >= number for role, number in expected.items())


def describe_connections(cluster: Cluster) -> str:
    counts = (f"{_num_connected(cluster, role)} {role}" for role in ("prefill", "decode"))
    return f"its gateway was connected to {' and '.join(counts)} workers"
