"""The gateway places prompts by what workers report."""

from dataclasses import replace

from tests.gateway.conftest import Bench, Gateway, read_all, token_request
from tests.support.fake_workers import FakeDecodeWorker, FakePrefillWorker

PROMPT = [5] * 200


async def cluster(bench: Bench) -> tuple[FakeDecodeWorker, FakePrefillWorker]:
    decode, prefill = await bench.workers.add_decode(), await bench.workers.add_prefill()
    await bench.announce(decode, prefill)
    return decode, prefill


async def place(bench: Bench, gateway: Gateway, prefill: FakePrefillWorker) -> bool:
    """Returns whether the prefill worker computed the prompt."""
    num_before = prefill.num_jobs
    await read_all(gateway.stub.Generate(token_request(PROMPT, 3)))
    await bench.at_rest()
    return prefill.num_jobs > num_before


async def test_the_faster_worker_gets_the_prompt(bench: Bench) -> None:
    decode, prefill = await cluster(bench)
    decode.load = replace(decode.load, prefill_tokens_per_s=10_000.0)
    prefill.load = replace(prefill.load, prefill_tokens_per_s=1000.0)
    gateway = await bench.gateway(local_prefill_tokens=None)
    assert not await place(bench, gateway, prefill)


async def test_without_rates_and_behind_a_slower_decode_worker_it_leaves(bench: Bench) -> None:
    decode, prefill = await cluster(bench)
    gateway = await bench.gateway(local_prefill_tokens=None)
    assert await place(bench, gateway, prefill)
    decode.load = replace(decode.load, prefill_tokens_per_s=1000.0, num_computed_prompt_tokens=200)
    prefill.load = replace(prefill.load, prefill_tokens_per_s=10_000.0, num_computed_prompt_tokens=200)
    assert await place(bench, gateway, prefill)


async def test_handoffs_that_take_long_keep_prompts_on_the_decode_worker(bench: Bench) -> None:
    decode, prefill = await cluster(bench)
    decode.load = replace(decode.load, prefill_tokens_per_s=1000.0)
    prefill.load = replace(prefill.load, prefill_tokens_per_s=10_000.0)
    prefill.wire_ms = 60_000.0
    gateway = await bench.gateway(local_prefill_tokens=None)
    assert [await place(bench, gateway, prefill) for _ in range(4)] == [True, True, True, False]
