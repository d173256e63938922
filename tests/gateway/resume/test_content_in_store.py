"""What Redis gets of a running request: state, times and counts of all, content only of those that
another gateway may have to continue.
"""

from array import array
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import redis.asyncio

from kvrelay.errors import UnavailableError
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.wire.errors import error_of_rpc
from tests.gateway.conftest import Answer, Bench, Gateway, eventually, read_all, read_into, token_request
from tests.gateway.resume.test_resume import EXPECTED, PROMPT, id_of, two_workers, wait_for_state
from tests.support.fake_workers import FakeDecodeWorker

STOP = "no such stop"
NUM_READ = 10


@dataclass
class Begun:
    """A request that stands still after some tokens, and the deltas that its client got."""

    owner: Gateway
    other: Gateway
    decode: FakeDecodeWorker
    call: Any
    answer: Answer
    deltas: list[bytes]

    @property
    def request_id(self) -> str:
        return id_of(self.answer)

    def go_on(self) -> None:
        self.decode.release(f"token:{NUM_READ}")


async def begun(bench: Bench, **fields: Any) -> Begun:
    _, decode = await two_workers(bench)
    owner, other = await bench.gateway(), await bench.gateway()
    decode.hold(f"token:{NUM_READ}")
    call = owner.stub.Generate(token_request(PROMPT, 20, sampling_stop=[STOP.encode()], **fields))
    answer, deltas = Answer(), []
    async for message in call:
        answer.add(message)
        if message.HasField("delta"):
            deltas.append(message.delta.SerializeToString())
        if len(answer.token_ids.get(0, ())) == NUM_READ:
            break

    async def is_counted() -> bool:
        info = (await other.stub.GetRequest(pb.GetRequestRequest(request_id=id_of(answer)))).request
        return info.state == pb.REQUEST_STATE_DECODING and info.num_output_tokens == NUM_READ

    await eventually(is_counted)
    return Begun(owner, other, decode, call, answer, deltas)


async def contents(bench: Bench) -> bytes:
    """All keys and all values, of every type."""
    parts: list[bytes] = []
    async with redis.asyncio.Redis.from_url(bench.valkey.url) as connected:
        client: Any = connected  # the stubs know nothing of what a key is
        for key in await client.keys("*"):
            parts.append(key)
            match await client.type(key):
                case b"hash":
                    parts += [part for pair in (await client.hgetall(key)).items() for part in pair]
                case b"stream":
                    parts += [value for _, fields in await client.xrange(key) for value in fields.values()]
                case b"zset":
                    parts += await client.zrange(key, 0, -1)
                case kind:
                    raise AssertionError(f"{key!r} is a {kind!r}, which this test does not read")
    return b"\n".join(parts)


@pytest.mark.parametrize(
    ("fields", "is_stored"),
    [({}, False), ({"resumable": True}, True), ({"idempotency_key": "key"}, True)],
    ids=["plain", "resumable", "with a key"],
)
async def test_a_running_requests_content_is_in_redis_only_where_it_may_be_continued(
    bench: Bench, fields: dict[str, Any], is_stored: bool
) -> None:
    request = await begun(bench, **fields)
    stored = await contents(bench)
    assert request.request_id.encode() in stored
    assert [delta in stored for delta in request.deltas] == [is_stored] * len(request.deltas)
    parts = [array("I", PROMPT[begin : begin + 4]).tobytes() for begin in range(0, len(PROMPT), 4)]
    assert [part in stored for part in parts] == [is_stored] * len(parts)
    assert (STOP.encode() in stored) is is_stored
    request.call.cancel()
    request.go_on()


async def test_what_redis_lost_is_written_again_without_content(bench: Bench) -> None:
    request = await begun(bench)
    await bench.flush_store()
    request.go_on()
    await read_into(request.answer, request.call)
    await wait_for_state(request.other, request.request_id, "SUCCEEDED")
    stored = await contents(bench)
    assert not any(delta in stored for delta in request.deltas)
    assert array("I", PROMPT[:4]).tobytes() not in stored


async def test_another_gateway_streams_a_request_through_its_owner(bench: Bench) -> None:
    request = await begun(bench)
    following = request.other.stub.Resume(pb.ResumeRequest(request_id=request.request_id, from_index=3))
    again = Answer()
    await read_into(again, following, from_index=3, until=NUM_READ - 3)
    request.go_on()
    await read_into(again, following, from_index=3)
    await read_into(request.answer, request.call)
    assert again.token_ids == {0: EXPECTED[3:]}
    assert again.finished == request.answer.finished


async def test_a_reader_elsewhere_that_leaves_holds_nothing(bench: Bench) -> None:
    request = await begun(bench)
    following = request.other.stub.Resume(pb.ResumeRequest(request_id=request.request_id))
    await read_into(Answer(), following, until=NUM_READ)
    following.cancel()
    request.call.cancel()
    await wait_for_state(request.other, request.request_id, "CANCELLED")
    await bench.at_rest()


async def test_a_plain_requests_reader_elsewhere_ends_with_its_gateway(bench: Bench) -> None:
    request = await begun(bench)
    following = request.other.stub.Resume(pb.ResumeRequest(request_id=request.request_id))
    await read_into(Answer(), following, until=NUM_READ)
    await request.owner.stop_at_once()
    for _ in range(2):  # the stream that was open, and a new one
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in following:
                pass
        assert isinstance(error_of_rpc(failure.value), UnavailableError)
        following = request.other.stub.Resume(pb.ResumeRequest(request_id=request.request_id))
    following.cancel()
    info = (await request.other.stub.GetRequest(pb.GetRequestRequest(request_id=request.request_id))).request
    assert info.attempt == 1, "without its prompt nobody takes it over"
    await bench.at_rest()


async def test_a_repeat_with_the_key_goes_on_with_a_dead_gateways_request(bench: Bench) -> None:
    request = await begun(bench, idempotency_key="key")
    await request.owner.stop_at_once()
    request.go_on()
    message = token_request(PROMPT, 20, sampling_stop=[STOP.encode()], idempotency_key="key")
    again = await read_all(request.other.stub.Generate(message))
    assert (id_of(again), again.token_ids) == (request.request_id, {0: EXPECTED})
