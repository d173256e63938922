"""Whether a gateway is connected to all started workers."""

from collections.abc import Callable, Mapping

from kvrelay.client import TLS, AsyncClient, Cluster, WorkerRole
from kvrelay.errors import KvrelayError


async def ask_cluster(address: str, tls: TLS | None, prover: Callable[[str], str] | None) -> Cluster | None:
    """`prover` makes a key that counts only if the gateway listens already."""
    api_key = None if prover is None else prover(address)
    try:
        async with AsyncClient(address, api_key=api_key, tls=tls) as client:
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
