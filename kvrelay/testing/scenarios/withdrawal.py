"""Keys are withdrawn while their streams run."""

import asyncio
import time
from typing import Any

from kvrelay.errors import KvrelayError, UnauthenticatedError
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.load import TokenCheck, make_request, run_request
from kvrelay.testing.security import Security, TenantsClient
from kvrelay.testing.waiting import wait_until

HELD_AT_TURN = 10
TIMEOUT_S = 30.0


async def withdrawal(num_rounds: int = 10) -> dict[str, Any]:
    """Milliseconds until a withdrawn key's stream ends, and until both gateways refuse the key."""
    ended_ms, refused_ms = list[float](), list[float]()
    async with FaultCluster(num_gateways=2, requests={"local_prefill_tokens": 0}, secured=True) as cluster:
        assert cluster.security is not None
        async with TenantsClient(cluster.addresses, cluster.security) as client:
            for number in range(num_rounds):
                ended, refused = await withdraw_under_a_stream(cluster, cluster.security, client, number)
                ended_ms.append(ended)
                refused_ms.append(refused)
                await cluster.check()
    return {
        "withdrawals": num_rounds,
        "stream_ended_median_ms": round(sorted(ended_ms)[num_rounds // 2], 1),
        "stream_ended_worst_ms": round(max(ended_ms), 1),
        "refused_median_ms": round(sorted(refused_ms)[num_rounds // 2], 1),
        "refused_worst_ms": round(max(refused_ms), 1),
    }


async def withdraw_under_a_stream(
    cluster: FaultCluster, security: Security, client: TenantsClient, number: int
) -> tuple[float, float]:
    """The stream is held at its decode worker, so that only the withdrawal can end it."""
    request = make_request(number, tenant=f"leaver {number}", num_tokens=60)
    tenant, check = security.tenant_of(request.tenant), TokenCheck(1)
    fault = cluster.arm_one_of("decode", "decode.turn_begins", FaultAction.WAIT, at=HELD_AT_TURN, wait_ms=60_000)
    running = asyncio.create_task(run_request(client, request, check))
    try:
        await fault.wait_until_fired()
        await wait_until(lambda: check.num_tokens > 0, "the client has a token of the held stream")
        withdrawn_at = time.monotonic()
        security.withdraw(tenant)
        outcome = await asyncio.wait_for(running, TIMEOUT_S)
        ended_ms = (time.monotonic() - withdrawn_at) * 1000
        assert isinstance(outcome.error, UnauthenticatedError), f"it ended with {outcome.error!r}"
        assert check.num_tokens < request.num_tokens
        for address in cluster.addresses:
            await _wait_for_answer(address, security, tenant, refuses=True)
        refused_ms = (time.monotonic() - withdrawn_at) * 1000
    finally:
        running.cancel()
        fault.disarm()
        security.restore(tenant)
    for address in cluster.addresses:
        await _wait_for_answer(address, security, tenant, refuses=False)
    return ended_ms, refused_ms


async def _wait_for_answer(address: str, security: Security, tenant: str, *, refuses: bool) -> None:
    async with TenantsClient([address], security) as client:
        asking = client.of(tenant)

        async def answers() -> bool:
            try:
                await asking.list_models(timeout_s=5.0)
            except UnauthenticatedError:
                return refuses
            except KvrelayError:
                return False
            return not refuses

        await wait_until(answers, f"{address} {'refuses' if refuses else 'takes'} the key of {tenant}", TIMEOUT_S)
