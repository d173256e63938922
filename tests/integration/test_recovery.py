"""A process of a supervised cluster dies or leaves: the stream goes on with the same tokens, its
client sees a pause at the most.

Each process stops itself at a named step before it is killed or told to leave, so that the fault
comes in the middle for certain.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient, Delta
from kvrelay.errors import UnavailableError
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import FaultCluster
from tests.integration.clusters import CALM, assert_at_rest, random_prompt, token_ids
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 5}
THREE_WITH_PENALTIES: dict[str, Any] = {
    "temperature": 0.8,
    "seed": 6,
    "n": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
}
NUM_TOKENS, NUM_STEPS_BEFORE = 200, 40


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultCluster]:
    model = make_tiny_model("llama", tmp_path_factory.mktemp("models"))
    requests = {"local_prefill_tokens": 0, "worker_wait_ms": 60000}
    async with FaultCluster(num_decode=2, model=model, requests=requests, server=CALM, restart=True) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: FaultCluster) -> AsyncIterator[AsyncClient]:
    """Of the cluster, all of whose processes are up."""
    await cluster.wait_until_ready()
    async with cluster.client() as client:
        yield client


def options(**sampling: Any) -> dict[str, Any]:
    return {"max_tokens": NUM_TOKENS, "ignore_eos": True, "timeout_s": 120, **sampling}


def assert_each_index_once(deltas: list[Delta], num_sequences: int) -> None:
    for sequence in range(num_sequences):
        of_sequence = [delta for delta in deltas if delta.sequence == sequence]
        indices = [delta.index + place for delta in of_sequence for place in range(len(delta.tokens))]
        assert indices == list(range(NUM_TOKENS))


@pytest.mark.parametrize(
    ("number", "sampling"),
    [
        pytest.param(signal.SIGKILL, GREEDY, id="killed-greedy"),
        pytest.param(signal.SIGKILL, SEEDED, id="killed-seeded"),
        pytest.param(signal.SIGKILL, THREE_WITH_PENALTIES, id="killed-three-with-penalties"),
        pytest.param(signal.SIGTERM, THREE_WITH_PENALTIES, id="draining-three-with-penalties"),
    ],
)
async def test_the_stream_continues_at_the_next_index_when_its_decode_worker_ends(
    cluster: FaultCluster, client: AsyncClient, number: signal.Signals, sampling: dict[str, Any]
) -> None:
    prompt, num_sequences = random_prompt(1, 60), int(sampling.get("n", 1))
    undisturbed = await client.complete(token_ids=prompt, tenant="undisturbed", **options(**sampling))

    fault = cluster.arm_one_of("decode", "decode.step_begins", FaultAction.STOP, at=NUM_STEPS_BEFORE)
    stream = client.generate(token_ids=prompt, tenant=f"disturbed by {number}", **options(**sampling))
    reading = asyncio.create_task(_read(stream))
    victim = await fault.wait_until_fired()
    num_restarts, pid = victim.num_restarts, victim.pid
    os.kill(pid, number)
    if number != signal.SIGKILL:  # which ends a stopped process too
        os.kill(pid, signal.SIGCONT)
    deltas = await reading

    assert_each_index_once(deltas, num_sequences)
    for sequence in range(num_sequences):
        ours = [token.token_id for delta in deltas if delta.sequence == sequence for token in delta.tokens]
        assert ours == token_ids(undisturbed, sequence)
        text = "".join(delta.text for delta in deltas if delta.sequence == sequence)
        assert text == undisturbed.outputs[sequence].text
    assert stream.finished is not None
    if number == signal.SIGKILL:  # a draining worker may finish the stream itself
        assert stream.finished.phases.num_attempts > 1
    await victim.wait_until_restarted(num_restarts)
    await cluster.wait_until_ready()
    await assert_at_rest(client)


async def _read(stream: Any) -> list[Delta]:
    return [delta async for delta in stream]


async def test_a_prompt_whose_only_prefill_worker_dies_is_attempted_again(
    cluster: FaultCluster, client: AsyncClient
) -> None:
    prompt = random_prompt(2, 200)
    undisturbed = await client.complete(token_ids=prompt, tenant="undisturbed", **options(**GREEDY))

    victim = cluster["prefill-0"]
    num_restarts = victim.num_restarts
    with victim.arm("prefill.step_begins") as fault:
        completion = await client.complete(token_ids=prompt, tenant="disturbed", **options(**GREEDY))
        assert fault.num_fired == 1
    assert token_ids(completion) == token_ids(undisturbed)
    assert completion.finished.phases.num_attempts > 1
    await victim.wait_until_restarted(num_restarts)
    await cluster.wait_until_ready()
    await assert_at_rest(client)


async def test_workers_free_everything_when_their_gateway_dies(cluster: FaultCluster, client: AsyncClient) -> None:
    fault = cluster.arm_one_of("decode", "decode.step_begins", FaultAction.STOP, at=NUM_STEPS_BEFORE)
    stream = client.generate(token_ids=random_prompt(3, 60), **options(**GREEDY))
    reading = asyncio.create_task(_read(stream))
    worker = await fault.wait_until_fired()
    gateway = cluster["gateway"]
    num_restarts = gateway.num_restarts
    await gateway.kill()
    await worker.resume()
    with pytest.raises(UnavailableError):
        await reading
    assert stream.finished is None
    await gateway.wait_until_restarted(num_restarts)
    await cluster.wait_until_ready()
    await assert_at_rest(client)
