"""Redis with contents that kvrelay never wrote: the gateway says so with typed errors, and serves
all other requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import redis.asyncio

from gateway.streaming.frames import decode_frame
from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import UnreadableStateError
from kvrelay.state import member_registry
from kvrelay.state.request_list import NUM_BUCKETS, OLD_LIST_KEY, list_key
from kvrelay.state.request_record import SUMMARY_FIELDS, RequestRecord, decode_record, decode_summary
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from tests.fuzz.mutations import mutate_bytes
from tests.gateway.conftest import Bench, Gateway, read_all, token_request
from tests.gateway.conftest import bench as bench  # a fixture
from tests.state.test_request_record import as_stored
from tests.support.fake_workers import expected_token_ids
from tests.support.redis_fixtures import make_record

NUM_RECORDS = 5000
NUM_CONTENTS = 30
WAIT_S = 20.0
ODD_VALUES = (
    b"", b"-1", b"0", b"99999999999999999999", b"1e9", b"nan", b"0x10", b"1" * 5000, b"\xff\xfe", b"null", b"[" * 100_000, b"{}",
    b"x" * 100_000,
)  # fmt: skip
ODD_SAMPLING: tuple[dict[str, Any], ...] = (
    {}, {"n": "1"}, {"n": 1.5}, {"temperature": None}, {"temperature": "hot"}, {"stop": [1]}, {"stop": 7}, {"logit_bias": []},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"-1": 1.0}}, {"max_tokens": None}, {"seed": None}, {"seed": -1}, {"unknown": 1},
    {"top_p": 1e400}, {"stop_token_ids": [2**40]}, {"ignore_eos": "no"}, {"logprobs": 10**9}, {"min_tokens": True},
)  # fmt: skip


def odd_record(stored: dict[bytes, bytes], generator: random.Random) -> dict[bytes, bytes]:
    """A hash with one to three fields that are missing or odd."""
    odd = dict(stored)
    for _ in range(generator.randint(1, 3)):
        name = generator.choice(list(stored))
        match generator.randrange(5):
            case 0:
                odd.pop(name, None)
            case 1:
                odd[name] = generator.choice(ODD_VALUES)
            case 2:
                odd[name] = mutate_bytes(stored[name], generator.choice(list(stored.values())), generator)
            case 3:
                sampling = json.loads(stored[b"sampling"]) | generator.choice(ODD_SAMPLING)
                odd[b"sampling"] = json.dumps(sampling).encode()
            case _:
                odd[generator.randbytes(3)] = generator.randbytes(10)
    return odd


def test_a_record_of_anything_is_read_or_refused_with_one_kind_of_error() -> None:
    generator, stored = random.Random(1), as_stored(make_record())
    num_refused = 0
    for _ in range(NUM_RECORDS):
        odd = odd_record(stored, generator)
        try:
            record: RequestRecord | None = decode_record(odd, 1000)
        except UnreadableStateError as error:
            num_refused += 1
            assert len(error.message) > 20  # noqa: PT017 - most are refused, and not all
        else:
            assert record is not None
            record.sampling.validate()
            assert 0 <= record.attempt < 2**32
        with contextlib.suppress(UnreadableStateError):
            decode_summary([odd.get(name.encode()) for name in SUMMARY_FIELDS], 1000)
    assert NUM_RECORDS // 4 < num_refused < NUM_RECORDS


def test_a_member_of_anything_is_read_or_left_out() -> None:
    member = Member("w", MemberRole.DECODE, "127.0.0.1:1", "m", "f")
    payload, generator = member_registry._encode(member).encode(), random.Random(2)
    for odd in [*ODD_VALUES, *(mutate_bytes(payload, generator.randbytes(30), generator) for _ in range(NUM_RECORDS))]:
        read = member_registry._decode(odd)
        assert read is None or isinstance(read.address, str)


def test_a_frame_of_anything_is_read_or_refused() -> None:
    generator = random.Random(3)
    token = session_pb2.Token(token_id=3, logprob=-1.0)
    frame = pb.GenerateResponse(delta=pb.Delta(index=4, tokens=[token], text="é"))
    data = frame.SerializeToString()
    for _ in range(NUM_RECORDS):
        try:
            decode_frame(mutate_bytes(data, generator.randbytes(30), generator))
        except UnreadableStateError:
            continue


# --- a gateway over it ----------------------------------------------------------------------------

PROMPT = list(range(10, 30))
Client = Any
"""A Redis client: its types do not know of commands that give bytes."""


@pytest.fixture
async def store(bench: Bench) -> AsyncIterator[Client]:
    async with redis.asyncio.Redis.from_url(bench.valkey.url) as client:
        yield client


async def finished_request(gateway: Gateway) -> str:
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 4, resumable=True)))
    assert answer.token_ids[0] == expected_token_ids(PROMPT, 4)
    assert answer.accepted is not None
    return answer.accepted.request_id


async def replace(store: Client, key: str, generator: random.Random) -> None:
    """Something of another type than kvrelay's."""
    await store.delete(key)
    match generator.randrange(5):
        case 0:
            await store.set(key, generator.choice(ODD_VALUES))
        case 1:
            await store.rpush(key, "a", "b")
        case 2:
            await store.zadd(key, {"a": float("inf"), b"\xff\xfe": float("-inf"), "b": 1e300})
        case 3:
            await store.xadd(key, {"frame": b"\xff\xff"}, id=generator.choice(("*", "1-0", "7-7")))
        case _:
            await store.hset(key, mapping={"state": "DECODING", "x": "y"})


async def odd_request(store: Client, request_id: str, generator: random.Random) -> None:
    key = f"kvrelay:{{{request_id}}}:request"
    async with asyncio.timeout(WAIT_S):
        # It is written behind the stream; nothing says when.
        while not (stored := await store.hgetall(key)):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await store.delete(key)
    if odd := odd_record(stored, generator):
        await store.hset(key, mapping=odd)


async def odd_state(store: Client, request_id: str, generator: random.Random) -> None:
    """As if its owner were gone, or never were."""
    changes = {
        "state": generator.choice(("DECODING", "QUEUED", "nonsense", "")),
        "attempt": generator.choice(("1", "0", "x", "4294967296")),
        "gateway_id": generator.choice(("gone", "", "\0")),
        "redis_deadline_ms": generator.choice(("0", "99999999999999", "x")),
    }
    await store.hset(f"kvrelay:{{{request_id}}}:request", mapping=changes)


async def odd_log(store: Client, request_id: str, generator: random.Random) -> None:
    key = f"kvrelay:{{{request_id}}}:log"
    if generator.random() < 0.5:
        await replace(store, key, generator)
        return
    await store.delete(key)
    frame = pb.GenerateResponse(delta=pb.Delta(sequence=generator.choice((0, 5, 2**32 - 1)), index=3))
    for number in range(1, 4):
        data = generator.choice((b"", b"\xff\xff", frame.SerializeToString()))
        await store.xadd(key, {generator.choice(("frame", "what")): data}, id=f"{number}-0")
    await store.hset(f"kvrelay:{{{request_id}}}:request", mapping={"state": "DECODING", "gateway_id": "gone"})


async def odd_request_type(store: Client, request_id: str, generator: random.Random) -> None:
    await replace(store, f"kvrelay:{{{request_id}}}:request", generator)


LIST_KEYS = (OLD_LIST_KEY, *(list_key(bucket) for bucket in range(NUM_BUCKETS)))


async def odd_list(store: Client, request_id: str, generator: random.Random) -> None:
    key = generator.choice(LIST_KEYS)
    if generator.random() < 0.5:
        await replace(store, key, generator)
    else:
        scores = (float("inf"), float("-inf"), 1e300, -5.0, 2.5, 1e15)
        await store.zadd(key, {generator.randbytes(8): generator.choice(scores) for _ in range(5)})


async def odd_registry(store: Client, request_id: str, generator: random.Random) -> None:
    name = generator.choice(("leases", "members", "withdrawn"))
    if generator.random() < 0.5:
        await replace(store, f"kvrelay:{{registry}}:{name}", generator)
        return
    member = {
        "instance_id": "w\0",
        "role": generator.choice(("decode", "gateway", "king")),
        "address": generator.choice(ADDRESSES),
    }
    await store.hset("kvrelay:{registry}:members", "odd", generator.choice((json.dumps(member), "[[[", "{}")))
    await store.zadd("kvrelay:{registry}:leases", {"odd": 1e15, b"\xff": 1e15})


ADDRESSES = (
    "",
    "\0",
    "nowhere",
    "127.0.0.1:99999",
    "unix:/dev/null",
    "dns:///::::",
    "ipv4:1.2.3.4.5",
    "x" * 10_000,
    "127.0.0.1:1",
)
CONTENTS: tuple[Callable[[Client, str, random.Random], Awaitable[None]], ...] = (
    odd_request,
    odd_state,
    odd_log,
    odd_request_type,
    odd_list,
    odd_registry,
)


async def status_of(call: Any) -> grpc.StatusCode:
    """Reads it all, whatever it is."""
    try:
        if hasattr(call, "read"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as failure:
        return failure.code()
    return grpc.StatusCode.OK


async def ask_everything(gateway: Gateway, request_id: str) -> dict[str, grpc.StatusCode]:
    stub = gateway.stub
    calls: dict[str, Any] = {
        "GetRequest": stub.GetRequest(pb.GetRequestRequest(request_id=request_id), timeout=10),
        "ListRequests": stub.ListRequests(pb.ListRequestsRequest(), timeout=10),
        # a record may say that it runs on
        "Resume": stub.Resume(pb.ResumeRequest(request_id=request_id), timeout=0.3),
        "CancelRequest": stub.CancelRequest(pb.CancelRequestRequest(request_id=request_id), timeout=10),
        "GetCluster": stub.GetCluster(pb.GetClusterRequest(), timeout=10),
    }
    return {name: await status_of(call) for name, call in calls.items()}


@pytest.mark.parametrize(
    "num_contents", [NUM_CONTENTS, pytest.param(1500, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
async def test_odd_contents_never_stop_a_gateway(bench: Bench, store: Client, num_contents: int) -> None:
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    writer = await bench.gateway(local_prefill_tokens=1000)
    gateway = await bench.gateway(local_prefill_tokens=1000)
    generator = random.Random(num_contents)
    codes: set[grpc.StatusCode] = set()
    for number in range(num_contents):
        request_id = await finished_request(writer)
        content = CONTENTS[number % len(CONTENTS)]
        # a gateway wrote to the key in between
        with contextlib.suppress(redis.exceptions.ResponseError):
            await content(store, request_id, generator)
        answers = await ask_everything(gateway, request_id)
        bad = {
            name: code for name, code in answers.items() if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
        }
        assert not bad, f"{content.__name__}: {bad}"
        assert answers["GetCluster"] is grpc.StatusCode.OK, content.__name__
        codes |= set(answers.values())
        for key in (*LIST_KEYS, *member_registry._KEYS):
            if await store.type(key) not in (b"zset" if key != member_registry._KEYS[1] else b"hash", b"none"):
                await store.delete(key)
        await finished_request(gateway)
    assert {grpc.StatusCode.OK, grpc.StatusCode.DATA_LOSS} <= codes
