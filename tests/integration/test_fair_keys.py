"""A cluster whose gateway has keys: one key asks for everything, and 20 others are served."""

import asyncio
import contextlib
from pathlib import Path

import pytest
import yaml

from kvrelay.client import AsyncClient, Completion
from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.errors import KvrelayError, QuotaError
from kvrelay.security.keys import digest_of
from tests.integration.clusters import cluster_of, engine, random_prompt
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NUM_SMALL = 20
NUM_GREEDY = 60
NUM_PLACES = 32


def keys_file(folder: Path) -> str:
    names = ["greedy", *(f"small-{number}" for number in range(NUM_SMALL))]
    entries = [{"id": name, "tenant": name, "sha256": digest_of(f"key of {name}".replace(" ", "-"))} for name in names]
    path = folder / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": entries}))
    return str(path)


def client_of(address: str, name: str) -> AsyncClient:
    return AsyncClient(address, api_key=f"key-of-{name}")


async def be_greedy(address: str, number: int, refused: "asyncio.Future[QuotaError]") -> None:
    """Asks for eight long answers, and leaves after the first token."""
    async with client_of(address, "greedy") as client:
        prompt = random_prompt(number, 200)
        with contextlib.suppress(KvrelayError):
            try:
                async with client.generate(
                    token_ids=prompt, max_tokens=200, n=8, ignore_eos=True, resumable=True, seed=number
                ) as stream:
                    async for _ in stream:
                        return
            except QuotaError as error:
                if not refused.done():
                    refused.set_result(error)


async def ask_little(address: str, number: int) -> list[Completion]:
    async with client_of(address, f"small-{number}") as client:
        prompt = random_prompt(1000 + number, 12)
        return [await client.complete(token_ids=prompt, max_tokens=4, ignore_eos=True) for _ in range(2)]


async def test_none_of_20_keys_is_refused_while_one_asks_for_everything(tmp_path: Path) -> None:
    settings = engine(make_tiny_model("llama", tmp_path), num_kv_blocks=256, max_running_sequences=16)
    refused: asyncio.Future[QuotaError] = asyncio.get_running_loop().create_future()
    cluster = cluster_of([settings], [settings], max_running_requests=NUM_PLACES, local_prefill_tokens=0)
    guarded = {
        "quotas": QuotaSettings(place_wait_ms=60_000),
        "security": SecuritySettings(keys_file=keys_file(tmp_path)),
    }
    cluster.gateway = cluster.gateway.model_copy(update=guarded)
    async with cluster:
        address = cluster.gateway_address
        await ask_little(address, 0)
        greedy = [asyncio.create_task(be_greedy(address, number, refused)) for number in range(NUM_GREEDY)]
        async with asyncio.timeout(60):  # until it has all that it may have
            error = await refused
        answers = await asyncio.gather(*(ask_little(address, number) for number in range(NUM_SMALL)))
        for task in greedy:
            task.cancel()
        await asyncio.wait(greedy)
    assert [len(answer.outputs[0].tokens) for pair in answers for answer in pair] == [4] * 2 * NUM_SMALL
    assert "greedy" in error.message
    assert error.retry_after_ms > 0
