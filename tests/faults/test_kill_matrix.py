"""A process dies at each step of a request's life, in a cluster as it starts by default and in a
secured one.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient
from kvrelay.errors import RequestNotFoundError, UnavailableError
from kvrelay.testing import FaultCluster
from kvrelay.testing.load import Request, Tokens, fault_free_tokens, make_request, run_load, run_request
from kvrelay.testing.proxy import FaultProxy
from kvrelay.testing.scenarios.disconnects import POINTS
from kvrelay.testing.scenarios.withdrawal import withdraw_under_a_stream
from kvrelay.testing.security import REDIS_KEYS, TenantsClient
from kvrelay.testing.tenant_checks import TenantCheck, plain_connections
from tests.faults.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

STEPS = {**POINTS, "gateway.request_ends": "gateway", "decode.turn_begins": "decode"}
"""And the kind of process that dies there."""
SHORT_STEPS = ("prefill.chunk_sent", "decode.step_begins", "gateway.token_emitted")
"""One for each kind of process."""


async def tokens_though_killed_at(cluster: FaultCluster, request: Request, step: str) -> Tokens:
    """The request's tokens. Its client may ask every gateway, and may send it again."""
    fault = cluster.arm_one_of(STEPS[step], step)
    async with cluster.client() as client:
        completion = await client.complete(**request.options, idempotency_key=f"key of {request.tenant}")
    await (await fault.wait_until_fired()).wait_until_gone()
    return tuple(tuple(token.token_id for token in output.tokens) for output in completion.outputs)


@pytest.mark.soak
@pytest.mark.parametrize("step", STEPS)
async def test_a_process_dies_at_every_step(rig: Rig, step: str) -> None:
    request = rig.request(resumable=True)
    expected = await rig.expected(request)
    assert await tokens_though_killed_at(rig.cluster, request, step) == expected


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def secured() -> AsyncIterator[FaultCluster]:
    cluster = FaultCluster(
        num_gateways=2, num_prefill=1, num_decode=2, requests={"local_prefill_tokens": 0}, secured=True
    )
    async with cluster:
        yield cluster


async def test_with_everything_switched_on_each_kind_of_process_dies_and_tokens_are_the_same(
    secured: FaultCluster,
) -> None:
    requests = [make_request(number, resumable=True) for number in range(len(SHORT_STEPS))]
    async with secured.client() as client:
        expected = await fault_free_tokens(client, requests)
    await secured.take_baseline()
    for request, step in zip(requests, SHORT_STEPS, strict=True):
        again = replace(request, tenant=f"{request.tenant} again")
        assert await tokens_though_killed_at(secured, again, step) == expected[request], step
        secured.heal()
        await secured.restart_ended()
    report = await run_load(secured.addresses, requests, expected, 2, secured.connect)
    report.check()
    await secured.check()


async def test_the_rig_looks_whose_each_request_is(secured: FaultCluster) -> None:
    """The checks of a secured cluster can fail: each is given what it has to find."""
    assert secured.security is not None
    async with secured.client() as client:
        assert isinstance(client, TenantsClient)
        outcome = await run_request(client, make_request(100, tenant="somebody", num_tokens=4))
        assert outcome.error is None
        assert outcome.request_id is not None
        tenant = secured.security.tenant_of("somebody")
        assert secured.security.unchecked()[outcome.request_id] == tenant
        assert (await client.of(tenant).get_request(outcome.request_id)).tenant == tenant
        with pytest.raises(RequestNotFoundError):
            await client.of(secured.security.another(tenant)).get_request(outcome.request_id)
    await secured.check()
    assert outcome.request_id not in secured.security.unchecked()


async def test_the_rig_notices_a_refusal_and_a_foreign_tenant(secured: FaultCluster) -> None:
    security = secured.security
    assert security is not None
    log = security.audit_log("gateway")
    before = log.read_bytes()
    line = {"who": "gateway", "method": "/M", "request_id": "", "decision": "refused", "reason": "ACCESS_DENIED"}
    log.write_bytes(before + json.dumps(line).encode() + b"\n")
    problems = await TenantCheck(security).look(secured)
    log.write_bytes(before)
    assert "gateway was refused /M: ACCESS_DENIED" in problems
    async with secured.client() as client:
        outcome = await run_request(client, make_request(101, num_tokens=4))
    assert outcome.request_id is not None
    tenant = security.unchecked()[outcome.request_id]
    security._unchecked[outcome.request_id] = security.another(tenant)
    problems = await TenantCheck(security).look(secured)
    assert any(f"is kept as {tenant}'s" in problem for problem in problems)
    security._unchecked[outcome.request_id] = tenant
    await secured.check()


async def test_the_rig_notices_plain_text(secured: FaultCluster) -> None:
    """Through a proxy of its own: the cluster's are to see TLS only."""
    async with FaultProxy("127.0.0.1", secured["gateway"].proxy.port_of_target) as proxy:
        async with AsyncClient(proxy.address, timeout_s=5.0) as plain:
            with pytest.raises(UnavailableError):
                await plain.cluster()
        assert proxy.link().num_plain > 0
    assert plain_connections(secured) == []


async def test_a_withdrawn_key_ends_its_running_stream_and_nothing_of_it_is_left(secured: FaultCluster) -> None:
    """In whatever time: `python -m kvrelay.testing withdrawal` measures it."""
    assert secured.security is not None
    async with TenantsClient(secured.addresses, secured.security) as client:
        await withdraw_under_a_stream(secured, secured.security, client, 200)
    await secured.check()


async def test_the_rigs_redis_users_are_those_of_compose() -> None:
    script = run_path(str(Path(__file__).parents[2] / "deploy/compose/make_credentials.py"))
    assert {user: " ".join(keys) for user, keys in REDIS_KEYS.items()} == script["_KEYS"]
