"""Rows of the catalogue about what runs out: blocks, workers, descriptors, room in a log's pipe;
and other models.
"""

import asyncio
import resource
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

import pytest

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError
from kvrelay.testing import FaultCluster, FaultProcess, make_tiny_llama, wait_until
from kvrelay.testing.load import Request, fault_free_tokens, make_request, run_load, run_request
from tests.faults.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]


@pytest.mark.soak
async def test_d_out_of_blocks_preempts_and_never_deadlocks_and_other_models_are_not_paired() -> None:
    """A pool for one and a half requests, and beside it a decode worker of another model, which
    gets nothing.
    """
    requests = [make_request(number, 40, num_tokens=56) for number in range(12)]
    other_model = str(make_tiny_llama(seed=7))
    cluster = FaultCluster(
        num_decode=2,
        engine={"block_size": 8},
        decode_engines={0: {"num_kv_blocks": 18}, 1: {"model": other_model, "served_model_name": "other"}},
        requests={"local_prefill_tokens": 0},
    )
    async with cluster, cluster.client() as client:
        model = next(worker.model.name for worker in (await client.cluster()).workers if worker.model.name != "other")
        await check_small_pool(cluster, model, requests)


@pytest.mark.soak
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"kv_dtype": "bfloat16"}, {"kv_dtype": "int8"}], ids=str)
async def test_workers_whose_kv_differs_are_not_paired(changes: dict[str, object]) -> None:
    """The same weights under the same name, in another type or layout: no prefill worker pushes to
    it.
    """
    cluster = FaultCluster(num_decode=3, decode_engines={2: changes}, requests={"local_prefill_tokens": 0})
    async with cluster, cluster.client() as client:
        workers = {cluster.name_of_worker(worker): worker for worker in (await client.cluster()).workers}
        others = {worker.model.fingerprint for name, worker in workers.items() if name != "decode-2"}
        assert len(others) == 1
        assert workers["decode-2"].model.fingerprint not in others
        for number in range(12):
            phases = (await client.complete(**make_request(number).options)).finished.phases
            assert phases.transfer_bytes > 0
            assert phases.decode_worker_id != workers["decode-2"].worker_id
        await cluster.check()


async def check_small_pool(cluster: FaultCluster, model: str, requests: list[Request]) -> None:
    async with cluster.client() as client:
        expected = {}
        for request in requests:
            completion = await client.complete(**request.options, model=model)
            expected[request] = tuple(token.token_id for token in completion.outputs[0].tokens)

        async def run(request: Request) -> None:
            completion = await client.complete(**request.options, model=model)
            assert tuple(token.token_id for token in completion.outputs[0].tokens) == expected[request]

        await asyncio.gather(*(run(request) for request in requests))
        seen = await client.cluster()
        (stranger,) = [worker for worker in seen.workers if worker.model.name == "other"]
        assert stranger.load.num_computed_prompt_tokens == 0
        await cluster.check()


@pytest.mark.soak
@pytest.mark.parametrize("num_requests", [200])
async def test_a_herd_that_waited_for_workers_is_served_with_few_more_attempts(rig: Rig, num_requests: int) -> None:
    """All decode workers are off, requests queue up, and one after the other the workers come back."""
    requests = [rig.request(num_tokens=10) for _ in range(num_requests)]
    expected = await fault_free_tokens(rig.client, requests, 8)
    for worker in rig.cluster.of_role("decode"):
        await worker.kill()
    load = asyncio.create_task(run_load(rig.cluster.addresses, requests, expected, num_requests, rig.cluster.connect))
    async with AsyncExitStack() as clients:  # each look by a new connection would starve the proxies
        gateways = [
            await clients.enter_async_context(rig.cluster.client(gateway.name))
            for gateway in rig.cluster.of_role("gateway")
        ]
        await wait_until(lambda: are_waiting(gateways, num_requests), "all requests wait", 180)
    assert not any(worker.is_running for worker in rig.cluster.of_role("decode"))
    await rig.cluster.restart_ended()
    report = await load
    report.check()
    assert report.num_attempts <= 1.2 * num_requests


async def are_waiting(gateways: Sequence[AsyncClient], num_requests: int) -> bool:
    """Whether all gateways together have this many requests."""
    found = [len((await gateway.cluster()).running_requests) for gateway in gateways]
    return sum(found) == num_requests


async def test_streams_live_on_when_nobody_reads_the_logs(rig: Rig) -> None:
    """Every process's pipe is full, and something happens that all of them would log."""
    request, later = rig.request(num_tokens=100), rig.request()
    expected = [await rig.expected(request), await rig.expected(later)]
    processes = list(rig.cluster.processes.values())
    async with rig.held(request) as held:
        try:
            for process in processes:
                await wait_until(partial(is_full, process), f"the pipe of {process.name} is full")
            assert held.worker.link_from("gateway").close() > 0
            held.release()
            outcomes = [await held.outcome, await rig.run(later)]
        finally:
            for process in processes:
                process.drain_log()
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert [outcome.tokens for outcome in outcomes] == expected


def is_full(process: FaultProcess) -> bool:
    """Fills the pipe. What is in it is taken into the reader's buffer first, which has an end too."""
    return process.fill_log() == 0


async def test_a_gateway_out_of_descriptors_goes_on_with_its_streams(rig: Rig) -> None:
    gateway = rig.cluster["gateway"]
    request = rig.request(num_tokens=100)
    expected = await rig.expected(request)
    soft, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    async with rig.held(request) as held:
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (3, hard))
        num_refused = await count_refused(rig)
        held.release()
        outcome = await held.outcome
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert num_refused > 0, "the limit was felt"
    assert outcome.error is None
    assert outcome.tokens == expected
    assert (await run_request(rig.client, rig.request())).error is None


async def count_refused(rig: Rig) -> int:
    """How many of some new clients cannot connect."""
    num_refused = 0
    for _ in range(3):
        async with rig.cluster.client("gateway") as client:
            try:
                await client.cluster(timeout_s=0.5)
            except KvrelayError:
                num_refused += 1
    return num_refused
