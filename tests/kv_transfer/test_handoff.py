"""The contract: prefill worker, wire, decode worker give the tokens of `transformers.generate`, and
the KV really travels.
"""

import asyncio
import random
from dataclasses import replace
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvrelay.config.settings import TransferSettings
from kvrelay.core.job import Job
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.v1 import decode_pb2
from kvrelay.wire.convert import job_id_to_pb, reserve_to_pb, start_prefill_to_pb
from kvrelay.worker.engine_setup import WorkerEngine
from tests.support.jobs import make_job
from tests.support.scripted_gateway import ScriptedSession, session_with
from tests.support.worker_fixtures import RunningWorker, running_decode_worker, running_prefill_worker, tiny_engine

NUM_NEW_TOKENS = 12


@pytest.fixture
def engines() -> tuple[WorkerEngine, WorkerEngine]:
    return tiny_engine(), tiny_engine()


def generate(engine: WorkerEngine, prompt: list[int], num_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(engine.folder, dtype=torch.float32)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[misc]
            torch.tensor([prompt]),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    result: list[int] = output[0, len(prompt) :].tolist()
    return result


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(5, 320), k=num_tokens)


async def relay(decode: ScriptedSession, prefill: ScriptedSession, job: Job) -> decode_pb2.Reserved:
    """What a gateway does to start a job on two workers."""
    await decode.send(reserve=reserve_to_pb(job, decode.hello.model.fingerprint))
    reserved: decode_pb2.Reserved = await decode.expect("reserved")
    message = start_prefill_to_pb(job, reserved.ticket, reserved.push_address, reserved.num_cached_tokens)
    await prefill.send(start_prefill=message)
    return reserved


async def both_idle(*workers: RunningWorker) -> None:
    await asyncio.gather(*(worker.wait_until_idle() for worker in workers))


@pytest.mark.parametrize("transport", ["grpc", "shared-memory"])
@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 5, 16, 17, 50])
async def test_handed_over_tokens_equal_transformers_generate_and_all_kv_crosses_the_wire(
    engines: tuple[WorkerEngine, WorkerEngine], num_prompt_tokens: int, transport: Literal["grpc", "shared-memory"]
) -> None:
    prompt = random_prompt(num_prompt_tokens, num_prompt_tokens)
    job = make_job(prompt, NUM_NEW_TOKENS)
    settings = TransferSettings(transfer_message_kib=16, transfer_transport=transport)
    async with (
        running_prefill_worker(engines[0], settings) as prefill_worker,
        running_decode_worker(engines[1]) as decode_worker,
        session_with("prefill", prefill_worker.address) as prefill,
        session_with("decode", decode_worker.address) as decode,
    ):
        await relay(decode, prefill, job)
        done = await prefill.expect("prefill_done")
        started = await decode.expect("decode_started")
        transferred = await prefill.expect("transfer_done")
        tokens = await decode.collect_tokens(job.job_id, 0, [done.tokens[0].token.token_id])
        await both_idle(prefill_worker, decode_worker)
    layout = engines[0].model.kv_layout
    kv_bytes = 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * 4 * num_prompt_tokens
    assert tokens == generate(engines[0], prompt, NUM_NEW_TOKENS)
    assert started.kv_bytes == transferred.kv_bytes == kv_bytes
    assert started.num_transferred_tokens == num_prompt_tokens
    assert transferred.transport == transport
    assert transferred.transfer_ms >= transferred.exposed_ms >= 0
    assert transferred.transfer_ms >= transferred.wire_ms > 0


async def test_a_prefix_that_the_decode_worker_has_is_not_sent_again(
    engines: tuple[WorkerEngine, WorkerEngine],
) -> None:
    prompt = random_prompt(18)
    async with (
        running_prefill_worker(engines[0]) as prefill_worker,
        running_decode_worker(engines[1]) as decode_worker,
        session_with("prefill", prefill_worker.address) as prefill,
        session_with("decode", decode_worker.address) as decode,
    ):
        outputs = []
        for number, expected_cached in ((1, 0), (2, 16)):
            job = make_job(prompt, NUM_NEW_TOKENS, request_id=str(number) * 32)
            reserved = await relay(decode, prefill, job)
            done = await prefill.expect("prefill_done")
            started = await decode.expect("decode_started")
            assert reserved.num_cached_tokens == expected_cached
            assert started.num_transferred_tokens == 18 - expected_cached
            outputs.append(await decode.collect_tokens(job.job_id, 0, [done.tokens[0].token.token_id]))
            await both_idle(prefill_worker, decode_worker)
    assert outputs[0] == outputs[1] == generate(engines[0], prompt, NUM_NEW_TOKENS)


async def test_a_prefix_that_only_the_prefill_worker_has_is_sent(engines: tuple[WorkerEngine, WorkerEngine]) -> None:
    prompt = random_prompt(40)
    async with (
        running_prefill_worker(engines[0]) as prefill_worker,
        running_decode_worker(engines[1]) as first,
        running_decode_worker(tiny_engine()) as second,
        session_with("prefill", prefill_worker.address) as prefill,
    ):
        for number, worker in ((1, first), (2, second)):
            async with session_with("decode", worker.address) as decode:
                job = make_job(prompt, NUM_NEW_TOKENS, request_id=str(number) * 32)
                await relay(decode, prefill, job)
                done = await prefill.expect("prefill_done")
                assert done.num_cached_tokens == (0, 36)[number - 1]
                started = await decode.expect("decode_started")
                assert started.num_transferred_tokens == 40
                tokens = await decode.collect_tokens(job.job_id, 0, [done.tokens[0].token.token_id])
                assert tokens == generate(engines[0], prompt, NUM_NEW_TOKENS)
                await both_idle(prefill_worker, worker)


async def test_several_sequences_share_one_push_and_equal_those_of_a_local_run(
    engines: tuple[WorkerEngine, WorkerEngine],
) -> None:
    prompt = random_prompt(21)
    sampling = SamplingParams(temperature=1.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, seed=11, n=3)
    job = make_job(prompt, NUM_NEW_TOKENS, sampling=sampling, num_sequences=3)
    local = replace(job, job_id=replace(job.job_id, request_id="b" * 32), cache_salt="other")
    async with (
        running_prefill_worker(engines[0]) as prefill_worker,
        running_decode_worker(engines[1]) as decode_worker,
        session_with("prefill", prefill_worker.address) as prefill,
        session_with("decode", decode_worker.address) as decode,
    ):
        await relay(decode, prefill, job)
        done = await prefill.expect("prefill_done")
        pushed = {token.sequence: [token.token.token_id] for token in done.tokens}
        await collect_all(decode, job, pushed)
        await decode.send(reserve=reserve_to_pb(local, decode.hello.model.fingerprint))
        await decode.expect("reserved")
        await decode.send(run_prompt=decode_pb2.RunPrompt(job_id=job_id_to_pb(local.job_id)))
        run_here: dict[int, list[int]] = {0: [], 1: [], 2: []}
        await collect_all(decode, local, run_here)
        await both_idle(prefill_worker, decode_worker)
    assert pushed == run_here
    assert len({tuple(tokens) for tokens in pushed.values()}) == 3


async def test_a_request_that_ends_with_its_first_token_transfers_nothing(
    engines: tuple[WorkerEngine, WorkerEngine],
) -> None:
    job = make_job(random_prompt(20), max_tokens=1)
    async with (
        running_prefill_worker(engines[0]) as prefill_worker,
        running_decode_worker(engines[1]) as decode_worker,
        session_with("prefill", prefill_worker.address) as prefill,
        session_with("decode", decode_worker.address) as decode,
    ):
        await relay(decode, prefill, job)
        done = await prefill.expect("prefill_done")
        assert done.tokens[0].finish_reason
        assert (await prefill.expect("transfer_done")).kv_bytes == 0
        await decode.cancel_job(job.job_id)
        await both_idle(prefill_worker, decode_worker)
        assert decode.seen() == prefill.seen() == []


async def test_bfloat16_kv_is_handed_over(engines: tuple[WorkerEngine, WorkerEngine]) -> None:
    prompt = random_prompt(30)
    job = make_job(prompt, NUM_NEW_TOKENS)
    first, second = tiny_engine(dtype="bfloat16"), tiny_engine(dtype="bfloat16")
    async with (
        running_prefill_worker(first) as prefill_worker,
        running_decode_worker(second) as decode_worker,
        session_with("prefill", prefill_worker.address) as prefill,
        session_with("decode", decode_worker.address) as decode,
    ):
        await relay(decode, prefill, job)
        assert (await prefill.expect("transfer_done")).kv_bytes == 2 * 2 * 2 * 16 * 2 * 30
        done = await prefill.expect("prefill_done")
        tokens = await decode.collect_tokens(job.job_id, 0, [done.tokens[0].token.token_id])
        assert len(tokens) == NUM_NEW_TOKENS
        await both_idle(prefill_worker, decode_worker)


async def collect_all(decode: ScriptedSession, job: Job, outputs: dict[int, list[int]]) -> None:
    """Appends all tokens of all sequences."""
    running = set(outputs)
    while running:
        for token in (await decode.expect("step_output")).tokens:
            assert token.job_id == job_id_to_pb(job.job_id)
            assert token.index == len(outputs[token.sequence])
            outputs[token.sequence].append(token.token.token_id)
            if token.finish_reason:
                running.remove(token.sequence)
