"""int8 and bfloat16 give a sequence the same tokens alone, in a batch, and on another worker when
its own was killed.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient, WorkerRole
from kvrelay.engine.native import load_library
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import FaultCluster
from tests.integration.clusters import (
    CALM,
    assert_at_rest,
    greedy,
    random_prompt,
    token_ids,
    values_under_test,
    workers,
)
from tests.support import left_out
from tests.support.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),
    pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER),
]

ENGINES = {
    "with-kv-in-int8": {"quantize": "int8", "kv_dtype": "int8"},
    "with-kv-in-float32": {"quantize": "int8"},
    "in-bfloat16": {"dtype": "bfloat16"},
}
"""By the name that the model is served under."""
NUM_CONCURRENT = 16
NUM_PROMPT_TOKENS, NUM_TOKENS = 70, 60
ROW_BYTES = {"float32": 16 * 4, "bfloat16": 16 * 2, "int8": 16 + 4}
"""K of a token in one head of the tiny model."""
NUM_LONG_TOKENS, NUM_STEPS_BEFORE_DEATH = 400, 150
PROMPTS = [random_prompt(40 + number, NUM_PROMPT_TOKENS + 3 * number) for number in range(NUM_CONCURRENT)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(model: Path, request: pytest.FixtureRequest) -> AsyncIterator[FaultCluster]:
    """One prefill and two decode workers of each kind, and nothing is found in a cache: every
    prompt's KV is shipped.
    """
    kinds = [{**ENGINES[name], "served_model_name": name} for name in values_under_test(request, "model_name")]
    cluster = FaultCluster(
        num_prefill=len(kinds),
        num_decode=2 * len(kinds),
        model=model,
        engine={"prefix_cache": False, "prefill_chunk_tokens": 32, "num_kv_blocks": 1024},
        requests={"local_prefill_tokens": 0},
        server=CALM,
        prefill_engines=dict(enumerate(kinds)),
        decode_engines=dict(enumerate([*kinds, *kinds])),
    )
    async with cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(cluster: FaultCluster) -> AsyncIterator[AsyncClient]:
    async with cluster.client() as client:
        yield client


@pytest.mark.parametrize(
    "model_name",
    [
        "with-kv-in-int8",
        pytest.param("with-kv-in-float32", marks=pytest.mark.soak),
        pytest.param("in-bfloat16", marks=pytest.mark.soak),
    ],
)
async def test_tokens_are_the_same_alone_in_a_batch_and_after_their_decode_worker_was_killed(
    cluster: FaultCluster, client: AsyncClient, model_name: str
) -> None:
    alone = [await greedy(client, prompt, NUM_TOKENS, model=model_name) for prompt in PROMPTS]
    layout = workers(await client.cluster(), WorkerRole.DECODE, model_name)[0].model.kv_layout
    assert layout.bytes_per_layer_token == 2 * layout.num_kv_heads * ROW_BYTES[layout.dtype]
    for prompt, completion in zip(PROMPTS, alone, strict=True):
        assert completion.finished.phases.transfer_bytes == len(prompt) * layout.bytes_per_token
    expected = [token_ids(completion) for completion in alone]
    expected_long = token_ids(await greedy(client, PROMPTS[0], NUM_LONG_TOKENS, model=model_name))
    assert expected_long[:NUM_TOKENS] == expected[0]
    assert len({tuple(ids) for ids in expected}) > NUM_CONCURRENT // 2

    assert await _generate_together(client, model_name) == expected

    fault = cluster.arm_one_of("decode", "decode.step_begins", FaultAction.KILL, at=NUM_STEPS_BEFORE_DEATH)
    migrating = asyncio.create_task(greedy(client, PROMPTS[0], NUM_LONG_TOKENS, model=model_name))
    victim = await fault.wait_until_fired()
    beside = asyncio.create_task(_generate_together(client, model_name))
    migrated = await migrating
    await victim.wait_until_gone()
    assert migrated.finished.phases.num_attempts > 1
    assert token_ids(migrated) == expected_long
    assert await beside == expected
    await assert_at_rest(client)


async def _generate_together(client: AsyncClient, model_name: str) -> list[list[int]]:
    """Tokens of all prompts, as concurrent requests."""
    running = (greedy(client, prompt, NUM_TOKENS, model=model_name) for prompt in PROMPTS)
    return [token_ids(each) for each in await asyncio.gather(*running)]
