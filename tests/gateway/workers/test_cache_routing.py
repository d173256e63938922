"""What gateways do with what workers tell of their caches, over fake workers."""

import aiohttp
import pytest

from kvrelay.client.results import WorkerRole, cluster_from_pb
from kvrelay.kv_cache.prefix_hash import prefix_chain
from kvrelay.v1 import inference_pb2 as pb
from tests.gateway.conftest import Bench, Gateway, eventually, read_all, token_request
from tests.support.fake_workers import FakeDecodeWorker

PROMPT = list(range(10, 60))
NUM_BLOCKS = 3
SESSION = "kvrelay-session"


async def decode_workers(bench: Bench, number: int = 3) -> list[FakeDecodeWorker]:
    workers = [await bench.workers.add_decode() for _ in range(number)]
    await bench.announce(*workers)
    return workers


async def routing_of(gateway: Gateway) -> pb.RoutingInfo:
    return (await gateway.stub.GetCluster(pb.GetClusterRequest())).routing


async def is_connected(gateway: Gateway) -> bool:
    (worker,) = (await gateway.stub.GetCluster(pb.GetClusterRequest())).workers
    return worker.connected


async def until_entries(gateway: Gateway, number: int) -> None:
    async def known() -> bool:
        return (await routing_of(gateway)).num_index_entries == number

    await eventually(known)


async def chosen_for(gateway: Gateway, workers: list[FakeDecodeWorker], session: str = "") -> FakeDecodeWorker:
    """Where a request goes while nothing else runs."""
    before = [worker.num_jobs for worker in workers]
    metadata = [(SESSION, session)] if session else None
    await read_all(gateway.stub.Generate(token_request(PROMPT), metadata=metadata))
    (chosen,) = [worker for worker, count in zip(workers, before, strict=True) if worker.num_jobs > count]
    return chosen


def hashes(worker: FakeDecodeWorker) -> bytes:
    return b"".join(prefix for prefix, _ in prefix_chain(PROMPT, 16, worker.salt, NUM_BLOCKS))


async def test_requests_go_where_their_beginning_is_cached_until_it_is_gone(bench: Bench) -> None:
    workers = await decode_workers(bench)
    gateway = await bench.gateway(http=True)
    assert all(worker.wants_cache_changes for worker in workers)
    first = await chosen_for(gateway, workers)
    caching = workers[workers.index(first) - 1]  # not the one that load would choose
    chain = hashes(first)
    caching.num_cached_tokens = 16 * NUM_BLOCKS
    caching.tell_cache(chain, forgets_all=True)
    await until_entries(gateway, NUM_BLOCKS)
    assert {await chosen_for(gateway, workers) for _ in range(4)} == {caching}

    cluster = cluster_from_pb(await gateway.stub.GetCluster(pb.GetClusterRequest()))
    (hits,) = [each for each in cluster.cache_hits if each.role is WorkerRole.DECODE]
    assert cluster.routing == "prefix"
    assert (hits.num_prompt_tokens, hits.num_expected_tokens, hits.num_found_tokens) == (5 * 50, 4 * 48, 4 * 48)
    async with aiohttp.ClientSession() as session, session.get(gateway.http_url + "/metrics") as response:
        text = await response.text()
    assert 'kvrelay_routing_found_cached_tokens_total{role="decode"} 192' in text
    assert f"kvrelay_routing_index_entries {NUM_BLOCKS}" in text

    caching.tell_cache(evicted=chain[:16])
    await until_entries(gateway, NUM_BLOCKS - 1)
    for _ in range(2):
        await chosen_for(gateway, workers)
    cluster = cluster_from_pb(await gateway.stub.GetCluster(pb.GetClusterRequest()))
    assert [each.num_expected_tokens for each in cluster.cache_hits if each.role is WorkerRole.DECODE] == [4 * 48]


async def test_a_worker_that_dies_is_forgotten_with_its_cache(bench: Bench) -> None:
    workers = await decode_workers(bench)
    gateway = await bench.gateway()
    first = await chosen_for(gateway, workers)
    workers[0].tell_cache(hashes(first))
    workers[1].tell_cache(hashes(first)[:32])
    await until_entries(gateway, NUM_BLOCKS + 2)
    await bench.kill(workers[0])
    await until_entries(gateway, 2)
    assert await chosen_for(gateway, workers) is workers[1]


async def test_what_is_no_list_of_hashes_ends_the_session_and_nothing_else(bench: Bench) -> None:
    (worker,) = workers = await decode_workers(bench, 1)
    gateway = await bench.gateway()
    worker.tell_cache(b"a" * 16)
    await until_entries(gateway, 1)
    worker.tell_cache(b"a" * 17)
    await until_entries(gateway, 0)
    await eventually(lambda: is_connected(gateway))
    assert await chosen_for(gateway, workers) is worker


@pytest.mark.parametrize("routing", ["load", "two-choices", "round-robin", "session"])
async def test_other_strategies_ask_for_no_caches_and_serve(bench: Bench, routing: str) -> None:
    workers = await decode_workers(bench)
    gateway = await bench.gateway(routing=routing)
    assert not any(worker.wants_cache_changes for worker in workers)
    chosen = [await chosen_for(gateway, workers) for _ in range(4)]
    assert (await routing_of(gateway)).strategy == routing
    if routing == "round-robin":
        assert len(set(chosen[:3])) == 3
        assert chosen[3] is chosen[0]


async def test_a_session_key_keeps_requests_together_on_every_gateway(bench: Bench) -> None:
    workers = await decode_workers(bench, 4)
    gateways = [await bench.gateway(routing="session") for _ in range(2)]
    homes = {key: await chosen_for(gateways[0], workers, key) for key in ("a", "b", "c", "d", "e", "f")}
    assert len(set(homes.values())) > 1
    for key, home in homes.items():
        assert await chosen_for(gateways[1], workers, key) is home
