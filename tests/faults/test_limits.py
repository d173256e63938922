"""Rows of the catalogue about what runs out: blocks, workers, descriptors, room in a log's pipe; and other models."""

import asyncio
import resource

import pytest

from kvrelay.errors import KvrelayError
from kvrelay.testing import FaultCluster, FaultProcess, make_tiny_llama
from kvrelay.testing.load import Request, fault_free_tokens, make_request, run_load, run_request
from tests.faults.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]


@pytest.mark.soak
async def test_d_out_of_blocks_preempts_and_never_deadlocks_and_other_models_are_not_paired() -> None:
    """A pool for one and a half requests, and beside it a decode worker of another model, which gets nothing."""
    requests = [make_request(number, 40, num_tokens=56) for number in range(12)]
    other_model = str(make_tiny_llama(seed=7))
    cluster = FaultCluster(
        num_decode=2,
        engine={"block_size": 8},
        decode_engines={0: {"num_kv_blocks": 18}, 1: {"model": other_model, "served_model_name": "other"}},
        relay={"local_prefill_tokens": 0},
    )
    async with cluster, cluster.client() as client:
        model = next(worker.model.name for worker in (await client.cluster()).workers if worker.model.name != "other")
        await check_small_pool(cluster, model, requests)


@pytest.mark.soak
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"kv_dtype": "bfloat16"}, {"kv_dtype": "int8"}], ids=str)
async def test_workers_whose_kv_differs_are_not_paired(changes: dict[str, object]) -> None:
    """The same weights under the same name, in another type or layout: no prefill worker pushes to it."""
    cluster = FaultCluster(num_decode=3, decode_engines={2: changes}, relay={"local_prefill_tokens": 0})
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
    load = asyncio.create_task(run_load(rig.cluster.addresses, requests, expected, num_requests))
    await asyncio.sleep(1.0)
    assert not any(worker.is_running for worker in rig.cluster.of_role("decode"))
    await rig.cluster.restart_ended()
    report = await load
    report.check()
    assert report.num_attempts <= 1.2 * num_requests


async def test_streams_live_on_when_nobody_reads_the_logs(rig: Rig) -> None:
    """Every process's pipe is full, and something happens that all of them would log."""
    request, later = rig.request(num_tokens=400, timeout_s=20.0), rig.request(timeout_s=20.0)
    expected = [await rig.expected(request), await rig.expected(later)]
    processes = list(rig.cluster.processes.values())
    stream = asyncio.create_task(rig.run(request))
    try:
        for process in processes:
            await fill_until_full(process)
        for worker in rig.cluster.of_role("decode")[:1]:
            worker.link_from("gateway").close()
        outcomes = [await stream, await rig.run(later)]
    finally:
        for process in processes:
            process.drain_log()
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert [outcome.tokens for outcome in outcomes] == expected


async def fill_until_full(process: FaultProcess) -> None:
    """What is in the pipe is taken into the reader's buffer first, which has an end too."""
    for _ in range(10):
        if process.fill_log() == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the pipe does not fill")


async def test_a_gateway_out_of_descriptors_goes_on_with_its_streams(rig: Rig) -> None:
    gateway = rig.cluster["gateway"]
    request = rig.request(num_tokens=400)
    expected = await rig.expected(request)
    stream = rig.client.generate(**request.options)
    tokens: list[int] = []
    soft, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    limited, num_refused = False, 0
    async for delta in stream:
        tokens += [token.token_id for token in delta.tokens]
        if len(tokens) >= 20 and not limited:
            resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (3, hard))
            limited = True
            num_refused += await count_refused(rig)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert num_refused > 0, "the limit was felt"
    assert tuple(tokens) == expected[0]
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
