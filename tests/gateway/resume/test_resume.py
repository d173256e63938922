"""Output that outlives its stream: cancel, resume, takeover, idempotency, a store that is away."""

import asyncio
from typing import Any

import grpc
import pytest
import redis.asyncio

from gateway.api.idempotency import body_digest
from kvrelay.errors import (
    IdempotencyConflictError,
    QuotaError,
    RequestNotFoundError,
    StoreFullError,
    UnavailableError,
)
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.state_store import StateStore
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.wire.errors import error_of_rpc
from tests.gateway.conftest import Answer, Bench, Gateway, eventually, read_all, read_into, token_request
from tests.support.fake_workers import TOKENIZER, FakeDecodeWorker, FakePrefillWorker, expected_token_ids
from tests.support.redis_fixtures import stopped

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
    """Starts a request and reads `num_tokens` of it."""
    call = gateway.stub.Generate(token_request(PROMPT, 20, **fields))
    answer = Answer()
    await read_into(answer, call, until=num_tokens)
    assert answer.accepted is not None
    return answer, call


def id_of(answer: Answer) -> str:
    assert answer.accepted is not None
    return answer.accepted.request_id


async def resume(gateway: Gateway, request_id: str, from_index: int = 0) -> Answer:
    return await read_all(
        gateway.stub.Resume(pb.ResumeRequest(request_id=request_id, from_index=from_index)), from_index
    )


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


async def test_only_some_requests_run_on_without_a_client(bench: Bench) -> None:
    """Otherwise one client could fill all places and leave."""
    _, decode = await two_workers(bench)
    gateway = await bench.gateway(max_running_requests=4, resume_grace_ms=3_600_000)
    decode.hold("token:10")
    begun = [await begin(gateway, 5, resumable=True) for _ in range(2)]
    ids = [id_of(answer) for answer, _ in begun]
    for _, call in begun:
        call.cancel()
    ended: list[str] = []

    async def one_ended() -> bool:
        for request_id in ids:
            info = (await gateway.stub.GetRequest(pb.GetRequestRequest(request_id=request_id))).request
            if info.state == pb.REQUEST_STATE_FAILED:
                ended.append(request_id)
        return bool(ended)

    await eventually(one_ended)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await resume(gateway, ended[0])
    assert isinstance(error_of_rpc(failure.value), QuotaError)
    decode.release("token:10")
    (kept,) = set(ids) - set(ended)
    assert (await resume(gateway, kept)).token_ids == {0: EXPECTED}
    await bench.at_rest()


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
    await wait_for_state(other, id_of(answer), "DECODING")
    following = asyncio.create_task(resume(other, id_of(answer), from_index=3))
    decode.release("token:10")
    assert (await following).token_ids[0] == EXPECTED[3:]
    await read_into(answer, call)
    assert answer.token_ids[0] == EXPECTED
    await wait_for_state(other, id_of(answer), "SUCCEEDED")


async def test_an_ended_request_is_read_at_another_gateway(bench: Bench) -> None:
    await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    answer = await read_all(owner.stub.Generate(token_request(PROMPT, 20, resumable=True)))
    await wait_for_state(other, id_of(answer), "SUCCEEDED")
    again = await resume(other, id_of(answer))
    assert (again.accepted, again.token_ids, again.finished) == (answer.accepted, answer.token_ids, answer.finished)


async def test_an_output_that_nobody_may_ask_for_again_is_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay.state.state_store.FOLLOW_MS", 1)
    await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    plain, resumable, with_key = [
        await read_all(owner.stub.Generate(token_request(PROMPT, 20, **fields)))
        for fields in ({}, {"resumable": True}, {"idempotency_key": "key"})
    ]
    for answer in (plain, resumable, with_key):
        await wait_for_state(other, id_of(answer), "SUCCEEDED")
    for answer in (resumable, with_key):
        assert (await resume(other, id_of(answer))).token_ids[0] == EXPECTED
    await eventually_gone(bench, f"kvrelay:{{{id_of(plain)}}}:log")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await resume(other, id_of(plain))
    error = error_of_rpc(failure.value)
    assert isinstance(error, RequestNotFoundError)
    assert "--keep-outputs" in error.message
    assert (await resume(owner, id_of(plain))).token_ids[0] == EXPECTED  # from its memory


async def test_all_outputs_are_kept_where_the_operator_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.state.state_store.FOLLOW_MS", 1)
    await two_workers(bench)
    owner, other = await bench.gateway(keep_outputs=True), await bench.gateway()
    answer = await read_all(owner.stub.Generate(token_request(PROMPT, 20)))
    await wait_for_state(other, id_of(answer), "SUCCEEDED")
    assert (await resume(other, id_of(answer))).token_ids[0] == EXPECTED


async def eventually_gone(bench: Bench, key: str) -> None:
    async with redis.asyncio.Redis.from_url(bench.valkey.url) as client:

        async def is_gone() -> bool:
            return not await client.exists(key)

        await eventually(is_gone)


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
    call = owner.stub.Generate(
        token_request(PROMPT, 20, sampling_n=num_sequences, sampling_temperature=1.0, resumable=True)
    )
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
    assert decode.num_jobs == 1


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


async def test_a_refused_request_leaves_its_key_free(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway()
    with pytest.raises(grpc.aio.AioRpcError):
        await read_all(gateway.stub.Generate(token_request(PROMPT, 100_000, idempotency_key="k")))
    await read_all(gateway.stub.Generate(token_request(PROMPT, 4, idempotency_key="k")))


async def test_a_key_whose_request_was_never_written_starts_a_new_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.api.generation.APPEARANCE_TIMEOUT_S", 0.2)
    await two_workers(bench)
    gateway = await bench.gateway()
    request = token_request(PROMPT, 20, idempotency_key="k")
    async with RedisConnection(bench.valkey.url, timeout_ms=5000) as connection:
        owner = await StateStore(connection, "dead").claim_idempotency_key(
            "", "k", body_digest(request), "never-written", 60_000
        )
    assert owner == "never-written"
    answers = await asyncio.gather(*(read_all(gateway.stub.Generate(request)) for _ in range(5)))
    assert len({id_of(answer) for answer in answers}) == 1
    assert all(answer.token_ids[0] == EXPECTED for answer in answers)


async def test_streams_continue_while_the_store_is_down_and_it_catches_up(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:10")
    answer, call = await begin(gateway, 10, resumable=True)
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


async def test_requests_that_the_store_lost_are_written_again(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:10")
    answer, call = await begin(gateway, 10, resumable=True)
    await wait_for_state(other, id_of(answer), "DECODING")
    await bench.flush_store()
    decode.release("token:10")
    await read_into(answer, call)
    await wait_for_state(other, id_of(answer), "SUCCEEDED")
    assert (await resume(other, id_of(answer))).token_ids[0] == EXPECTED


async def leave_a_request(bench: Bench, owner: Gateway, other: Gateway, decode: FakeDecodeWorker) -> Answer:
    """A request whose gateway dies after its tenth token; the store has it."""
    decode.hold("token:10")
    answer, _ = await begin(owner, 10, resumable=True)
    await wait_for_state(other, id_of(answer), "DECODING")
    await owner.stop_at_once()
    await bench.at_rest()
    decode.release("token:10")
    return answer


async def test_clients_that_resume_a_dead_gateways_request_share_one_takeover(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    owner, other, third = await bench.gateway(), await bench.gateway(), await bench.gateway()
    answer = await leave_a_request(bench, owner, other, decode)
    again = await asyncio.gather(*(resume(gateway, id_of(answer)) for gateway in [other, third] * 5))
    assert all(one.token_ids[0] == EXPECTED for one in again)
    info = await third.stub.GetRequest(pb.GetRequestRequest(request_id=id_of(answer)))
    assert info.request.attempt == 2


@pytest.mark.parametrize("operation", ["take_over", "read_frames"])
async def test_a_takeover_survives_the_loss_of_the_stores_answer(
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
    """Loses the store's first answer to an operation since a takeover, which was carried out."""
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


async def test_new_requests_are_refused_while_the_store_is_full(bench: Bench) -> None:
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


async def test_a_dead_gateways_requests_end_unless_they_are_resumable(bench: Bench) -> None:
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
