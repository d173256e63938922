"""A gateway treats a Redis that refuses commands like any other outage."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

from kvrelay.v1 import inference_pb2 as pb
from tests.gateway.conftest import Answer, Bench, Gateway, eventually, read_all, read_into, token_request
from tests.support.fake_workers import expected_token_ids

PROMPT = list(range(10, 50))


@asynccontextmanager
async def changed(bench: Bench, settings: Mapping[str, str]) -> AsyncIterator[None]:
    """Changes Valkey's settings for the block."""
    client: Any = redis.asyncio.Redis.from_url(bench.valkey.url)
    async with client:
        before = {name: (await client.config_get(name))[name] for name in settings}
        for name, value in settings.items():
            await client.config_set(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                await client.config_set(name, value)


@asynccontextmanager
async def disallowed(bench: Bench, *rules: str) -> AsyncIterator[None]:
    """Revokes rights of all connections for the block."""
    client: Any = redis.asyncio.Redis.from_url(bench.valkey.url, single_connection_client=True)
    async with client:
        await client.execute_command("ACL", "SETUSER", "admin", "on", "nopass", "~*", "&*", "+@all")
        await client.execute_command("AUTH", "admin", "any")
        await client.execute_command("ACL", "SETUSER", "default", *rules)
        try:
            yield
        finally:
            await client.execute_command("ACL", "SETUSER", "default", "on", "~*", "&*", "+@all")


async def cluster_of(gateway: Gateway) -> pb.GetClusterResponse:
    answer: pb.GetClusterResponse = await gateway.stub.GetCluster(pb.GetClusterRequest())
    return answer


async def serves_as_in_an_outage(bench: Bench, outage: AbstractAsyncContextManager[None], said: str) -> None:
    """Requests are served while Redis refuses, the gateway reports it, and writes catch up."""
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    gateway = await bench.gateway()
    decode.hold("token:3")
    running = gateway.stub.Generate(token_request(PROMPT, 20, resumable=True))
    answer = Answer()
    await read_into(answer, running, until=3)
    assert answer.accepted is not None
    request_ids = [answer.accepted.request_id]
    async with outage:
        decode.release("token:3")
        await read_into(answer, running)
        assert answer.token_ids[0] == expected_token_ids(PROMPT, 20)
        for number in range(3):
            for fields in ({}, {"resumable": True}, {"idempotency_key": f"key-{number}"}):
                served = await read_all(gateway.stub.Generate(token_request(PROMPT, 4, **fields)))
                assert served.token_ids[0] == expected_token_ids(PROMPT, 4)
                assert served.accepted is not None
                request_ids.append(served.accepted.request_id)
        cluster = await cluster_of(gateway)
        assert cluster.state_store == pb.STATE_STORE_HEALTH_DEGRADED
        assert said in cluster.state_store_problem

    async def healthy() -> bool:
        return (await cluster_of(gateway)).state_store == pb.STATE_STORE_HEALTH_OK

    await eventually(healthy)
    other = await bench.gateway()

    async def all_written() -> bool:
        answers = [
            await other.stub.GetRequest(pb.GetRequestRequest(request_id=request_id)) for request_id in request_ids
        ]
        return all(each.request.state == pb.REQUEST_STATE_SUCCEEDED for each in answers)

    await eventually(all_written)


async def test_too_few_replicas_count_as_an_outage(bench: Bench) -> None:
    await serves_as_in_an_outage(bench, changed(bench, {"min-replicas-to-write": "1"}), "min-replicas-to-write")


async def test_a_primary_that_becomes_a_replica_counts_as_an_outage(bench: Bench) -> None:
    @asynccontextmanager
    async def demoted() -> AsyncIterator[None]:
        client: Any = redis.asyncio.Redis.from_url(bench.valkey.url)
        async with client:
            await client.execute_command("REPLICAOF", "127.0.0.1", "1")
            try:
                yield
            finally:
                await client.execute_command("REPLICAOF", "NO", "ONE")

    await serves_as_in_an_outage(bench, demoted(), "replica")


@pytest.mark.parametrize(
    ("rule", "said"), [("-@scripting", "EVALSHA"), ("-xadd", "XADD"), ("resetkeys", "keys"), ("-@write", "~kvrelay:*")]
)
async def test_revoked_rights_count_as_an_outage(bench: Bench, rule: str, said: str) -> None:
    await serves_as_in_an_outage(bench, disallowed(bench, rule), said)
