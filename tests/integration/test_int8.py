"""int8 gives a sequence the same tokens alone, in a batch, and on another worker when its own was killed."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient, WorkerRole
from kvrelay.engine.native import load_library
from kvrelay.local_cluster import LocalCluster
from tests.integration.clusters import (
    assert_at_rest,
    cluster_of,
    engine,
    greedy,
    random_prompt,
    token_ids,
    values_under_test,
    workers,
)
from tests.integration.test_recovery import listening_ports
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),
    pytest.mark.skipif(load_library() is None, reason="no C compiler"),
]

KV_DTYPES = {"with-kv-in-int8": "int8", "with-kv-in-float32": "auto"}
"""By the name that a model with int8 weights is served under."""
NUM_CONCURRENT = 16
NUM_PROMPT_TOKENS, NUM_TOKENS = 70, 60
ROW_BYTES = {"float32": 16 * 4, "int8": 16 + 4}
"""K of a token in one head of the tiny model."""
NUM_LONG_TOKENS = 400
PROMPTS = [random_prompt(40 + number, NUM_PROMPT_TOKENS + 3 * number) for number in range(NUM_CONCURRENT)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(model: Path, request: pytest.FixtureRequest) -> AsyncIterator[LocalCluster]:
    """One prefill and two decode workers of each kind, and nothing is found in a cache: every prompt's KV is shipped."""
    changes = {"quantize": "int8", "prefix_cache": False, "prefill_chunk_tokens": 32}
    names = values_under_test(request, "model_name")
    kinds = [engine(model, **changes, kv_dtype=KV_DTYPES[name], served_model_name=name) for name in names]
    async with cluster_of(kinds, [*kinds, *kinds], local_prefill_tokens=0) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.gateway_address) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def processes(cluster: LocalCluster, client: AsyncClient) -> dict[str, str]:
    """Names of the decode workers' processes by worker id; found in advance, for a tiny model is done before one has looked."""
    ports = {port: name for name in cluster.names for port in listening_ports(cluster.pid(name)) if name.startswith("decode")}
    decoding = workers(await client.cluster(), WorkerRole.DECODE)
    return {worker.worker_id: ports[int(worker.address.rpartition(":")[2])] for worker in decoding}


@pytest.mark.parametrize("model_name", ["with-kv-in-int8", pytest.param("with-kv-in-float32", marks=pytest.mark.soak)])
async def test_tokens_are_the_same_alone_in_a_batch_and_after_their_decode_worker_was_killed(
    cluster: LocalCluster, client: AsyncClient, processes: dict[str, str], model_name: str
) -> None:
    alone = [await greedy(client, prompt, NUM_TOKENS, model=model_name) for prompt in PROMPTS]
    decode_workers = workers(await client.cluster(), WorkerRole.DECODE, model_name)
    layout = decode_workers[0].model.kv_layout
    assert layout.bytes_per_layer_token == 2 * layout.num_kv_heads * ROW_BYTES[layout.dtype]
    for prompt, completion in zip(PROMPTS, alone, strict=True):
        assert completion.finished.phases.transfer_bytes == len(prompt) * layout.bytes_per_token
    expected = [token_ids(completion) for completion in alone]
    expected_long = token_ids(await greedy(client, PROMPTS[0], NUM_LONG_TOKENS, model=model_name))
    assert expected_long[:NUM_TOKENS] == expected[0]
    assert len({tuple(ids) for ids in expected}) > NUM_CONCURRENT // 2

    assert await _generate_together(client, model_name) == expected

    stream = client.generate(
        token_ids=PROMPTS[0], model=model_name, temperature=0.0, max_tokens=NUM_LONG_TOKENS, ignore_eos=True, timeout_s=120
    )
    killed = [token.token_id for token in (await anext(stream)).tokens]
    # A tiny model would be done before one has looked who computes it: both stand still meanwhile.
    of_model = {worker.worker_id for worker in decode_workers}
    for worker_id in of_model:
        await cluster.kill(processes[worker_id], signal.SIGSTOP)
    assert stream.accepted is not None
    owner = (await client.get_request(stream.accepted.request_id)).decode_worker_id
    await cluster.kill(processes[owner], signal.SIGKILL)
    for worker_id in of_model - {owner}:
        await cluster.kill(processes[worker_id], signal.SIGCONT)
    beside = asyncio.create_task(_generate_together(client, model_name))
    async for delta in stream:
        killed += [token.token_id for token in delta.tokens]
    assert stream.finished is not None
    assert stream.finished.phases.num_attempts > 1
    assert killed == expected_long
    assert await beside == expected
    await assert_at_rest(client)


async def _generate_together(client: AsyncClient, model_name: str) -> list[list[int]]:
    """Tokens of all prompts, as concurrent requests."""
    running = (greedy(client, prompt, NUM_TOKENS, model=model_name) for prompt in PROMPTS)
    return [token_ids(each) for each in await asyncio.gather(*running)]
