"""Generate through a real gateway over fake workers: success, reordered reports, dying workers."""

import asyncio

import grpc
import pytest

from gateway.routing.circuit_breaker import INITIAL_LIMIT
from kvrelay.core.job import FailureKind
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from tests.gateway.conftest import Answer, Bench, eventually, read_all, read_into, token_request
from tests.support.fake_workers import KV_BYTES, TOKENIZER, FakeDecodeWorker, expected_token_ids

PROMPT = list(range(10, 50))


async def test_a_request_goes_through_both_workers_and_leaves_nothing_behind(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 8)))
    expected = expected_token_ids(PROMPT, 8)
    assert answer.token_ids == {0: expected}
    assert answer.texts[0] == TOKENIZER.decode(expected)
    assert answer.finished is not None
    assert answer.finished.usage.num_output_tokens == 8
    phases = answer.finished.phases
    assert (phases.num_attempts, phases.transfer_bytes, phases.prefill_ms, phases.transfer_ms) == (1, KV_BYTES, 2, 3)
    assert (phases.prefill_worker_id, phases.decode_worker_id) == (prefill.worker_id, decode.worker_id)
    assert phases.total_ms >= phases.time_to_first_token_ms > 0
    await bench.at_rest()


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
async def test_short_outputs_end_once(bench: Bench, num_tokens: int) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, num_tokens)))
    assert answer.token_ids == {0: expected_token_ids(PROMPT, num_tokens)}
    assert answer.reasons == {0: session_pb2.FINISH_REASON_LENGTH}
    await bench.at_rest()


async def test_several_sequences_share_one_job(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 5, sampling_n=3)))
    assert answer.token_ids == {sequence: expected_token_ids(PROMPT, 5, sequence) for sequence in range(3)}
    assert decode.num_jobs == 1


async def test_text_and_chat_are_tokenized_by_the_workers_files(bench: Bench) -> None:
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    gateway = await bench.gateway()
    await read_all(gateway.stub.Generate(pb.GenerateRequest(text="Hello 🎉")))
    assert TOKENIZER.decode(list(decode.reserved_prompts[0])) == "Hello 🎉"
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    await read_all(gateway.stub.Generate(pb.GenerateRequest(chat=chat)))
    rendered = TOKENIZER.decode(list(decode.reserved_prompts[1]), skip_special_tokens=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_a_decode_worker_alone_computes_the_prompt(bench: Bench) -> None:
    await bench.announce(await bench.workers.add_decode())
    gateway = await bench.gateway()
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
    assert answer.token_ids == {0: expected_token_ids(PROMPT, 4)}
    assert answer.finished is not None
    assert answer.finished.phases.prefilled_on_decode_worker
    assert answer.finished.phases.prefill_ms == 2


async def test_tokens_that_overtake_the_first_token_wait_for_it(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    prefill.hold("report")
    call = gateway.stub.Generate(token_request(PROMPT, 6))
    reading = asyncio.create_task(read_all(call))
    await prefill.wait_for("report")
    await eventually(lambda: all_decoded(decode))
    prefill.release("report")
    assert (await reading).token_ids == {0: expected_token_ids(PROMPT, 6)}
    await bench.at_rest()


async def all_decoded(decode: FakeDecodeWorker) -> bool:
    return decode.num_jobs > 0 and not decode.jobs


async def test_a_stop_string_ends_its_sequence_and_frees_it(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    text = TOKENIZER.decode(expected_token_ids(PROMPT, 200))
    stop = text[20:23]
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 200, sampling_stop=[stop.encode()])))
    assert answer.texts[0] == text[: text.index(stop)]
    assert answer.reasons == {0: session_pb2.FINISH_REASON_STOP}
    await bench.at_rest()


async def test_a_stop_string_of_one_of_two_sequences_leaves_the_other_running(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    texts = [TOKENIZER.decode(expected_token_ids(PROMPT, 30, sequence)) for sequence in range(2)]
    stop = next(texts[0][i : i + 3] for i in range(10, 25) if texts[0][i : i + 3] not in texts[1])
    answer = await read_all(
        gateway.stub.Generate(token_request(PROMPT, 30, sampling_n=2, sampling_stop=[stop.encode()]))
    )
    assert answer.texts == {0: texts[0][: texts[0].index(stop)], 1: texts[1]}
    await bench.at_rest()


PREFILL_STEPS = ["prefill_done", "push", "transfer_done"]
DECODE_STEPS = ["reserved", "decode_started", "token:1", "token:5", "token:7"]


@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("step", PREFILL_STEPS)
async def test_the_death_of_a_prefill_worker_changes_no_token(bench: Bench, step: str, num_sequences: int) -> None:
    first, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(first, decode)
    gateway = await bench.gateway()
    first.hold(step)
    call, answer = gateway.stub.Generate(token_request(PROMPT, 8, sampling_n=num_sequences)), Answer()
    if step == "transfer_done":
        # the gateway streams second tokens once it knows that the decode worker has begun
        await read_into(answer, call, until=2 * num_sequences)
    await first.wait_for(step)
    await bench.kill(first)
    await read_into(answer, call)
    assert answer.token_ids == {sequence: expected_token_ids(PROMPT, 8, sequence) for sequence in range(num_sequences)}
    assert answer.finished is not None
    assert answer.finished.phases.num_attempts == (1 if step == "transfer_done" else 2)
    await bench.at_rest()


@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("step", DECODE_STEPS)
async def test_the_death_of_a_decode_worker_changes_no_token(bench: Bench, step: str, num_sequences: int) -> None:
    prefill, first = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, first)
    gateway = await bench.gateway()
    first.hold(step)
    reading = asyncio.create_task(read_all(gateway.stub.Generate(token_request(PROMPT, 8, sampling_n=num_sequences))))
    await first.wait_for(step)
    second = await bench.workers.add_decode()
    await bench.announce(second)
    await bench.kill(first)
    answer = await reading
    assert answer.token_ids == {sequence: expected_token_ids(PROMPT, 8, sequence) for sequence in range(num_sequences)}
    for sequence in range(num_sequences):
        assert answer.texts[sequence] == TOKENIZER.decode(expected_token_ids(PROMPT, 8, sequence))
    assert answer.finished is not None
    assert answer.finished.phases.num_attempts > 1
    assert second.num_jobs > 0
    await bench.at_rest()


@pytest.mark.parametrize(
    "kind", [FailureKind.OUT_OF_CAPACITY, FailureKind.DRAINING, FailureKind.TRANSFER, FailureKind.INTERNAL]
)
@pytest.mark.parametrize("step", ["reserved", "token:3"])
async def test_a_failure_of_the_only_decode_worker_is_tried_again(bench: Bench, step: str, kind: FailureKind) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    decode.hold(step)
    decode.fail_at(step, kind)
    reading = asyncio.create_task(read_all(gateway.stub.Generate(token_request(PROMPT, 8))))
    await decode.wait_for(step)
    if kind is FailureKind.DRAINING:
        await bench.announce(await bench.workers.add_decode())
    decode.release(step)
    answer = await reading
    assert answer.token_ids == {0: expected_token_ids(PROMPT, 8)}
    assert answer.finished is not None
    assert answer.finished.phases.num_attempts == 2
    await bench.at_rest()


async def test_a_request_that_always_fails_ends_with_internal(bench: Bench) -> None:
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    gateway = await bench.gateway(max_attempts=3)
    decode.fail_at("prompt", FailureKind.INTERNAL, times=3)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await read_all(gateway.stub.Generate(token_request(PROMPT)))
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    await bench.at_rest()


async def test_a_request_without_any_worker_waits_and_is_served_when_one_comes(bench: Bench) -> None:
    first = await bench.workers.add_decode()
    await bench.announce(first)
    gateway = await bench.gateway()
    await read_all(gateway.stub.Generate(token_request(PROMPT, 1)))
    await bench.kill(first)
    reading = asyncio.create_task(read_all(gateway.stub.Generate(token_request(PROMPT, 4))))
    await bench.announce(await bench.workers.add_decode())
    assert (await reading).token_ids == {0: expected_token_ids(PROMPT, 4)}


async def test_a_request_without_any_worker_fails_in_the_end(bench: Bench) -> None:
    first = await bench.workers.add_decode()
    await bench.announce(first)
    gateway = await bench.gateway(worker_wait_ms=300)
    await bench.kill(first)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_many_requests_at_once(bench: Bench) -> None:
    for _ in range(2):
        await bench.announce(await bench.workers.add_prefill(), await bench.workers.add_decode())
    gateway = await bench.gateway()
    prompts = [[number + 1, *PROMPT] for number in range(40)]
    answers = await asyncio.gather(*(read_all(gateway.stub.Generate(token_request(prompt, 20))) for prompt in prompts))
    assert [answer.token_ids[0] for answer in answers] == [expected_token_ids(prompt, 20) for prompt in prompts]
    assert all(worker.num_jobs > 5 for worker in bench.workers.workers)
    await bench.at_rest()


async def test_a_deadline_ends_the_request_in_time(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    decode.hold("token:3")
    answer = Answer()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await read_into(answer, gateway.stub.Generate(token_request(PROMPT), timeout=2.0))
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert answer.token_ids == {0: expected_token_ids(PROMPT, 3)}
    await bench.at_rest()


async def test_coalesced_tokens_are_the_same_in_fewer_messages(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    text = TOKENIZER.decode(expected_token_ids(PROMPT, 200))
    stop = text[150:154]
    request = token_request(PROMPT, 200, sampling_n=2, sampling_stop=[stop.encode()], coalesce_ms=50)
    answer = await read_all(gateway.stub.Generate(request))
    assert answer.texts[0] == text[: text.index(stop)]
    assert answer.token_ids[1] == expected_token_ids(PROMPT, 200, 1)
    assert answer.num_messages < 100
    assert answer.accepted is not None
    resume = pb.ResumeRequest(request_id=answer.accepted.request_id, from_index=10, coalesce_ms=50)
    again = await read_all(gateway.stub.Resume(resume), from_index=10)
    assert again.token_ids[1] == answer.token_ids[1][10:]
    await bench.at_rest()


async def test_a_coalescing_time_out_of_range_is_refused(bench: Bench) -> None:
    await bench.announce(await bench.workers.add_decode())
    gateway = await bench.gateway()
    with pytest.raises(grpc.aio.AioRpcError, match="coalesce_ms") as failure:
        await read_all(gateway.stub.Generate(token_request(PROMPT, 4, coalesce_ms=51)))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_prompt_that_kills_workers_is_quarantined_and_no_other_request_fails(bench: Bench) -> None:
    first = await bench.workers.add_decode()
    await bench.announce(first)
    gateway = await bench.gateway()
    first.hold("prompt")
    poison = asyncio.create_task(read_all(gateway.stub.Generate(token_request([66, 6, 6], 4))))
    await first.wait_for("prompt")
    await bench.kill(first)
    second = await bench.workers.add_decode()
    second.hold("prompt")
    await bench.announce(second)
    await second.wait_for("prompt")
    innocent = asyncio.create_task(read_all(gateway.stub.Generate(token_request(PROMPT, 4))))

    async def has_both() -> bool:
        return second.num_jobs == 2

    await eventually(has_both)
    await bench.kill(second)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await poison
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "quarantined" in (failure.value.details() or "")
    await bench.announce(await bench.workers.add_decode())
    assert (await innocent).token_ids == {0: expected_token_ids(PROMPT, 4)}


async def test_a_worker_that_comes_after_an_outage_is_given_its_jobs_gradually(bench: Bench) -> None:
    first = await bench.workers.add_decode()
    await bench.announce(first)
    gateway = await bench.gateway()
    await read_all(gateway.stub.Generate(token_request(PROMPT, 1)))
    await bench.kill(first)
    reading = [asyncio.create_task(read_all(gateway.stub.Generate(token_request(PROMPT, 2)))) for _ in range(50)]

    async def all_wait() -> bool:
        return len((await gateway.stub.GetCluster(pb.GetClusterRequest())).running_requests) == 50

    await eventually(all_wait)
    second = await bench.workers.add_decode()
    second.hold("prompt")
    await bench.announce(second)
    await second.wait_for("prompt")
    assert second.num_jobs == INITIAL_LIMIT
    second.release("prompt")
    answers = await asyncio.gather(*reading)
    assert all(answer.finished and answer.finished.phases.num_attempts == 1 for answer in answers)
    await bench.at_rest()


async def test_a_suspected_request_without_a_worker_fails_like_any_other(bench: Bench) -> None:
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    gateway = await bench.gateway(worker_wait_ms=300)
    decode.hold("prompt")
    reading = asyncio.create_task(read_all(gateway.stub.Generate(token_request(PROMPT, 4))))
    await decode.wait_for("prompt")
    await bench.kill(decode)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await reading
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
