"""Output that outlives its stream: cancel, disconnect, resume here and elsewhere, takeover, idempotency, a store that is away."""

import asyncio
from typing import Any

import grpc
import pytest

from gateway.idempotency import body_digest
from kvrelay.error_status import error_of_rpc
from kvrelay.errors import IdempotencyConflictError, StoreFullError, UnavailableError
from kvrelay.redis_connection import RedisConnection
from kvrelay.state_store import StateStore
from kvrelay.v1 import inference_pb2 as pb
from tests.gateway.conftest import Answer, Bench, Gateway, eventually, read_all, read_into, token_request
from tests.gateway.fake_workers import TOKENIZER, FakeDecodeWorker, FakePrefillWorker, expected_token_ids
from tests.redis_fixtures import stopped

PROMPT = list(range(10, 50))
EXPECTED = expected_token_ids(PROMPT, 20)


async def two_workers(bench: Bench) -> tuple[FakePrefillWorker, FakeDecodeWorker]:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    return prefill, decode


async def state_of(gateway: Gateway, request_id: str) -> str:
    answer = await gateway.stub.GetRequest(pb.GetRequestRequest(request_id=request_id))
    return pb.RequestState.Name(answer.request.state).removeprefix("REQUEST_STATE_")


async def wait_for_state(gateway: Gateway, request_id: str, state: str) -> None:
    async def reached() -> bool:
        return await state_of(gateway, request_id) == state

    await eventually(reached)


async def begin(gateway: Gateway, num_tokens: int, **fields: Any) -> tuple[Answer, Any]:
    """A request of which so many tokens were read."""
    call = gateway.stub.Generate(token_request(PROMPT, 20, **fields))
    answer = Answer()
    await read_into(answer, call, until=num_tokens)
    assert answer.accepted is not None
    return answer, call


def id_of(answer: Answer) -> str:
    assert answer.accepted is not None
    return answer.accepted.request_id


async def resume(gateway: Gateway, request_id: str, from_index: int = 0) -> Answer:
    return await read_all(gateway.stub.Resume(pb.ResumeRequest(request_id=request_id, from_index=from_index)), from_index)


CANCEL_STEPS = ["prefill_done", "push", "reserved", "decode_started", "token:1", "token:5"]


@pytest.mark.parametrize("by_call", [True, False], ids=["CancelRequest", "disconnect"])
@pytest.mark.parametrize("step", CANCEL_STEPS)
async def test_a_cancel_frees_both_workers_at_every_step(bench: Bench, step: str, by_call: bool) -> None:
    prefill, decode = await two_workers(bench)
    gateway = await bench.gateway()
    worker = prefill if step in ("prefill_done", "push") else decode
    worker.hold(step)
    call: Any = gateway.stub.Generate(token_request(PROMPT, 20))
    frames = aiter(call)
    first = await anext(frames)
    await worker.wait_for(step)
    assert bench.workers.held()
    if by_call:
        await gateway.stub.CancelRequest(pb.CancelRequestRequest(request_id=first.accepted.request_id))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await read_into(Answer(), prepended(first, frames))
        assert failure.value.code() is grpc.StatusCode.CANCELLED
    else:
        call.cancel()
    await bench.at_rest()
    await wait_for_state(gateway, first.accepted.request_id, "CANCELLED")


async def prepended(first: Any, frames: Any) -> Any:
    yield first
    async for frame in frames:
        yield frame


async def test_cancelling_twice_or_too_late_is_no_error(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway()
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 3)))
    for _ in range(2):
        cancelled = await gateway.stub.CancelRequest(pb.CancelRequestRequest(request_id=id_of(answer)))
        assert cancelled.state == pb.REQUEST_STATE_SUCCEEDED


async def test_a_resumable_request_runs_on_without_a_client_and_is_resumed(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway = await bench.gateway()
    decode.hold("token:10")
    answer, call = await begin(gateway, 5, resumable=True)
    call.cancel()
    await decode.wait_for("token:10")
    decode.release("token:10")
    await wait_for_state(gateway, id_of(answer), "SUCCEEDED")
    rest = await resume(gateway, id_of(answer), from_index=5)
    assert answer.token_ids[0] + rest.token_ids[0] == EXPECTED
    assert answer.texts[0] + rest.texts[0] == TOKENIZER.decode(EXPECTED)


async def test_a_resumable_request_without_a_client_is_cancelled_after_its_grace(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway = await bench.gateway(resume_grace_ms=100)
    decode.hold("token:10")
    answer, call = await begin(gateway, 5, resumable=True)
    call.cancel()
    await wait_for_state(gateway, id_of(answer), "CANCELLED")
    await bench.at_rest()


async def test_a_running_request_is_followed_from_another_gateway(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:10")
    answer, call = await begin(owner, 10)
    following = asyncio.create_task(resume(other, id_of(answer), from_index=3))
    await wait_for_state(other, id_of(answer), "DECODING")
    decode.release("token:10")
    assert (await following).token_ids[0] == EXPECTED[3:]
    await read_into(answer, call)
    assert answer.token_ids[0] == EXPECTED
    await wait_for_state(other, id_of(answer), "SUCCEEDED")


async def test_an_ended_request_is_read_at_another_gateway(bench: Bench) -> None:
    await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    answer = await read_all(owner.stub.Generate(token_request(PROMPT, 20)))
    await wait_for_state(other, id_of(answer), "SUCCEEDED")
    again = await resume(other, id_of(answer))
    assert (again.accepted, again.token_ids, again.finished) == (answer.accepted, answer.token_ids, answer.finished)


async def test_a_failed_request_is_read_with_its_error_at_another_gateway(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:10")
    answer, _ = await begin(owner, 10)
    await wait_for_state(other, id_of(answer), "DECODING")
    await other.stub.CancelRequest(pb.CancelRequestRequest(request_id=id_of(answer)))
    await wait_for_state(other, id_of(answer), "CANCELLED")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await resume(other, id_of(answer))
    assert failure.value.code() is grpc.StatusCode.CANCELLED
    await bench.at_rest()


@pytest.mark.parametrize("num_sequences", [1, 2])
async def test_a_dead_gateways_request_is_taken_over_at_the_next_index(bench: Bench, num_sequences: int) -> None:
    _, decode = await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:10")
    call = owner.stub.Generate(token_request(PROMPT, 20, sampling_n=num_sequences, sampling_temperature=1.0, resumable=True))
    answer = Answer()
    await read_into(answer, call, until=10 * num_sequences)
    await wait_for_state(other, id_of(answer), "DECODING")
    await owner.stop_at_once()
    await bench.at_rest()
    decode.release("token:10")
    again = await resume(other, id_of(answer))
    assert again.token_ids == {sequence: expected_token_ids(PROMPT, 20, sequence) for sequence in range(num_sequences)}
    for sequence in range(num_sequences):
        assert again.texts[sequence] == TOKENIZER.decode(expected_token_ids(PROMPT, 20, sequence))
    assert again.accepted == answer.accepted
    info = await other.stub.GetRequest(pb.GetRequestRequest(request_id=id_of(answer)))
    assert info.request.attempt == 2
    await bench.at_rest()


async def test_fifty_requests_with_one_key_are_one(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateways = [await bench.gateway(), await bench.gateway()]
    request = token_request(PROMPT, 20, idempotency_key="k", tenant="t")
    answers = await asyncio.gather(*(read_all(gateways[number % 2].stub.Generate(request)) for number in range(50)))
    assert {id_of(answer) for answer in answers} == {id_of(answers[0])}
    assert all(answer.token_ids == {0: EXPECTED} for answer in answers)
    assert decode.num_works == 1


async def test_a_key_with_another_body_is_a_conflict_and_another_tenants_key_is_not(bench: Bench) -> None:
    await two_workers(bench)
    gateways = [await bench.gateway(), await bench.gateway()]
    first = await read_all(gateways[0].stub.Generate(token_request(PROMPT, 4, idempotency_key="k")))
    for gateway in gateways:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await read_all(gateway.stub.Generate(token_request(PROMPT, 5, idempotency_key="k")))
        assert isinstance(error_of_rpc(failure.value), IdempotencyConflictError)
    other = await read_all(gateways[0].stub.Generate(token_request(PROMPT, 5, idempotency_key="k", tenant="other")))
    assert id_of(other) != id_of(first)


async def test_a_refused_request_does_not_use_its_key_up(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway()
    with pytest.raises(grpc.aio.AioRpcError):
        await read_all(gateway.stub.Generate(token_request(PROMPT, 100_000, idempotency_key="k")))
    await read_all(gateway.stub.Generate(token_request(PROMPT, 4, idempotency_key="k")))


async def test_a_key_whose_request_was_never_written_begins_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.generation.APPEARANCE_TIMEOUT_S", 0.2)
    await two_workers(bench)
    gateway = await bench.gateway()
    request = token_request(PROMPT, 20, idempotency_key="k")
    async with RedisConnection(bench.valkey.url, timeout_ms=5000) as connection:
        claim = await StateStore(connection, "dead").claim_idempotency_key("", "k", body_digest(request), "never-written", 60_000)
    assert claim.mine
    answers = await asyncio.gather(*(read_all(gateway.stub.Generate(request)) for _ in range(5)))
    assert len({id_of(answer) for answer in answers}) == 1
    assert all(answer.token_ids[0] == EXPECTED for answer in answers)


async def test_streams_do_not_notice_that_the_store_is_away_and_it_catches_up(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:10")
    answer, call = await begin(gateway, 10)
    with stopped(bench.valkey):
        decode.release("token:10")
        await read_into(answer, call)
        assert answer.token_ids[0] == EXPECTED
        new = await read_all(gateway.stub.Generate(token_request(PROMPT, 20, idempotency_key="k")))
        assert new.token_ids[0] == EXPECTED
        joined = await read_all(gateway.stub.Generate(token_request(PROMPT, 20, idempotency_key="k")))
        assert id_of(joined) == id_of(new)
        cluster = await gateway.stub.GetCluster(pb.GetClusterRequest())
        assert cluster.state_store == pb.STATE_STORE_HEALTH_DEGRADED
        listed = await gateway.stub.ListRequests(pb.ListRequestsRequest())
        assert {request.request_id for request in listed.requests} == {id_of(answer), id_of(new)}
    for ended in (answer, new):
        await wait_for_state(other, id_of(ended), "SUCCEEDED")
        assert (await resume(other, id_of(ended))).token_ids[0] == EXPECTED


async def test_what_the_store_lost_is_written_again(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:10")
    answer, call = await begin(gateway, 10)
    await wait_for_state(other, id_of(answer), "DECODING")
    await bench.flush_store()
    decode.release("token:10")
    await read_into(answer, call)
    await wait_for_state(other, id_of(answer), "SUCCEEDED")
    assert (await resume(other, id_of(answer))).token_ids[0] == EXPECTED


async def leave_a_request(bench: Bench, owner: Gateway, other: Gateway, decode: FakeDecodeWorker) -> Answer:
    """A request of a gateway that dies after its tenth token; others know of it."""
    decode.hold("token:10")
    answer, _ = await begin(owner, 10, resumable=True)
    await wait_for_state(other, id_of(answer), "DECODING")
    await owner.stop_at_once()
    await bench.at_rest()
    decode.release("token:10")
    return answer


async def test_many_who_resume_a_dead_gateways_request_share_one_takeover(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    owner, other, third = await bench.gateway(), await bench.gateway(), await bench.gateway()
    answer = await leave_a_request(bench, owner, other, decode)
    again = await asyncio.gather(*(resume(gateway, id_of(answer)) for gateway in [other, third] * 5))
    assert all(one.token_ids[0] == EXPECTED for one in again)
    info = await third.stub.GetRequest(pb.GetRequestRequest(request_id=id_of(answer)))
    assert info.request.attempt == 2


@pytest.mark.parametrize("operation", ["take_over", "read_frames"])
async def test_a_takeover_whose_answer_from_the_store_is_lost_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    _, decode = await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    answer = await leave_a_request(bench, owner, other, decode)
    lost = lose_an_answer(monkeypatch, operation)
    assert (await resume(other, id_of(answer))).token_ids[0] == EXPECTED
    assert lost == [operation]
    info = await other.stub.GetRequest(pb.GetRequestRequest(request_id=id_of(answer)))
    assert info.request.attempt == 2


def lose_an_answer(monkeypatch: pytest.MonkeyPatch, operation: str) -> list[str]:
    """The first answer of an operation of the store, from a takeover on, is lost though it was carried out."""
    begun: list[str] = []
    lost: list[str] = []

    def wrap(name: str) -> None:
        method = getattr(StateStore, name)

        async def wrapped(self: StateStore, *arguments: Any, **options: Any) -> Any:
            begun.extend([name] if name == "take_over" else [])
            result = await method(self, *arguments, **options)
            if begun and name == operation and not lost:
                lost.append(name)
                raise UnavailableError("the answer is lost")
            return result

        monkeypatch.setattr(StateStore, name, wrapped)

    wrap("take_over")
    wrap("read_frames")
    return lost


async def test_a_store_without_memory_refuses_new_requests_until_it_has_some(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway()
    await bench.limit_store("1mb")
    await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))

    async def refused() -> bool:
        try:
            await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
        except grpc.aio.AioRpcError as failure:
            return isinstance(error_of_rpc(failure), StoreFullError)
        return False

    await eventually(refused)
    await bench.limit_store("0")

    async def admitted() -> bool:
        return not await refused()

    await eventually(admitted)


async def test_a_dead_gateways_requests_end_unless_they_can_be_resumed(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:5")
    [(plain, _), (resumable, _)] = [await begin(owner, 3, resumable=value) for value in (False, True)]
    for answer in (plain, resumable):  # the store is written behind the stream
        await wait_for_state(other, id_of(answer), "DECODING")
    await owner.stop_at_once()
    assert await state_of(other, id_of(plain)) not in ("FAILED", "SUCCEEDED"), "nobody knows yet"
    await wait_for_state(other, id_of(plain), "FAILED")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await resume(other, id_of(plain))
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    decode.release("token:5")
    assert (await resume(other, id_of(resumable))).token_ids == {0: EXPECTED}
