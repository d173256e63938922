"""A worker dies, is stopped or leaves: the stream goes on with the same tokens, and its client sees a pause at the most.

Each fault is injected at a place that the stream or the request's state shows, and the test checks that it fired.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient, Delta, RequestState, WorkerRole
from kvrelay.errors import UnavailableError
from kvrelay.local_cluster import LocalCluster
from tests.integration.clusters import assert_at_rest, cluster_of, engine, random_prompt, token_ids, wait_until, workers
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 6, "n": 3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
]
MAX_SIGNALS = 5


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    model = make_tiny_model("llama", tmp_path_factory.mktemp("models"))
    settings = engine(model)
    cluster = cluster_of([settings], [settings, settings], restart=True, local_prefill_tokens=0, worker_wait_ms=60000)
    async with cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.gateway_address) as client:
        yield client


async def decode_process(cluster: LocalCluster, client: AsyncClient, request_id: str) -> str:
    """Name of the process of the decode worker that runs the request."""
    request = await client.get_request(request_id)
    for worker in workers(await client.cluster(), WorkerRole.DECODE):
        if worker.worker_id == request.decode_worker_id:
            port = int(worker.address.rpartition(":")[2])
            return next(
                name for name in cluster.names if name.startswith("decode") and port in listening_ports(cluster.pid(name))
            )
    raise AssertionError(f"no connected decode worker runs {request_id}: {request}")


def listening_ports(pid: int) -> set[int]:
    """TCP ports that a process listens on, from /proc."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue  # closed meanwhile
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    return {int(fields[1].rpartition(":")[2], 16) for fields in lines if fields[3] == "0A" and fields[9] in inodes}


def assert_each_index_once(deltas: list[Delta], num_sequences: int, num_tokens: int) -> None:
    for sequence in range(num_sequences):
        of_sequence = [delta for delta in deltas if delta.sequence == sequence]
        indices = [delta.index + place for delta in of_sequence for place in range(len(delta.tokens))]
        assert indices == list(range(num_tokens))


async def wait_until_back(cluster: LocalCluster, client: AsyncClient, name: str, num_restarts: int) -> None:
    """Until a decode worker that had been restarted so often has been again, and both are connected."""

    async def is_back() -> bool:
        two = len(workers(await client.cluster(), WorkerRole.DECODE)) == 2
        return two and cluster.num_restarts(name) > num_restarts

    await wait_until(is_back, f"{name} is back", 60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_the_stream_continues_at_the_next_index_when_its_decode_worker_ends(
    cluster: LocalCluster, client: AsyncClient, sampling: dict[str, Any], number: signal.Signals
) -> None:
    prompt, num_tokens, num_sequences = random_prompt(1, 60), 400, int(sampling.get("n", 1))
    options: dict[str, Any] = {**sampling, "max_tokens": num_tokens, "ignore_eos": True, "timeout_s": 120}
    undisturbed = await client.complete(token_ids=prompt, tenant="undisturbed", **options)

    # On busy cores a worker may have computed all tokens before the signal reaches it: then once more.
    for attempt in range(MAX_SIGNALS):
        deltas: list[Delta] = []
        stream = client.generate(token_ids=prompt, tenant=f"disturbed by {number}, {attempt}", **options)
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) == 20:
                assert stream.accepted is not None
                name = await decode_process(cluster, client, stream.accepted.request_id)
                num_restarts = cluster.num_restarts(name)
                await cluster.kill(name, number)
        assert_each_index_once(deltas, num_sequences, num_tokens)
        for sequence in range(num_sequences):
            ours = [token.token_id for delta in deltas if delta.sequence == sequence for token in delta.tokens]
            assert ours == token_ids(undisturbed, sequence)
            text = "".join(delta.text for delta in deltas if delta.sequence == sequence)
            assert text == undisturbed.outputs[sequence].text
        await wait_until_back(cluster, client, name, num_restarts)
        assert stream.finished is not None
        if number == signal.SIGTERM or stream.finished.phases.num_attempts > 1:  # a draining worker may finish the stream itself
            break
    else:
        raise AssertionError(f"none of {MAX_SIGNALS} signals came in the middle of a stream")
    await assert_at_rest(client)


async def test_a_prompt_whose_prefill_worker_dies_is_attempted_again(cluster: LocalCluster, client: AsyncClient) -> None:
    prompt = random_prompt(2, 200)
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "timeout_s": 120}
    undisturbed = await client.complete(token_ids=prompt, tenant="undisturbed", **options)

    await cluster.kill("prefill-0", signal.SIGSTOP)
    running = asyncio.create_task(client.complete(token_ids=prompt, tenant="stopped", **options))

    async def prefilling() -> bool:
        return any(request.state is RequestState.PREFILLING for request in (await client.cluster()).running_requests)

    await wait_until(prefilling, "the request waits for the stopped prefill worker")
    await cluster.kill("prefill-0", signal.SIGKILL)
    completion = await running
    assert token_ids(completion) == token_ids(undisturbed)
    assert completion.finished.phases.num_attempts > 1

    async def back() -> bool:
        return bool(workers(await client.cluster(), WorkerRole.PREFILL))

    await wait_until(back, "the prefill worker is back", 60)
    await assert_at_rest(client)


async def test_workers_free_everything_when_their_gateway_dies(cluster: LocalCluster, client: AsyncClient) -> None:
    stream = client.generate(token_ids=random_prompt(3, 60), max_tokens=400, ignore_eos=True, temperature=0.0, timeout_s=60)

    async def read_and_kill() -> None:
        num_deltas = 0
        async for _ in stream:
            num_deltas += 1
            if num_deltas == 5:
                await cluster.kill("gateway", signal.SIGKILL)

    with pytest.raises(UnavailableError):
        await read_and_kill()
    assert stream.finished is None
    await cluster.wait_until_ready()
    await assert_at_rest(client)
