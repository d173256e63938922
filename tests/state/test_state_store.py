"""The store on real servers: moves, zombies, lost writes, the log, the list, idempotency keys and
takeover.
"""

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
from redis.crc import key_slot

from kvrelay.core.request_state import TERMINAL_STATES, RequestState, check_edge
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import (
    FrameGapError,
    IdempotencyConflictError,
    InvalidRequestError,
    RequestNotFoundError,
    StateLostError,
    StoreFullError,
    SupersededError,
)
from kvrelay.runtime.loop_delay import LoopDelay
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.request_list import (
    ADDS_PER_CLEANING,
    NUM_BUCKETS,
    OLD_LIST_KEY,
    bucket_of,
    list_key,
    old_list_key_of,
)
from kvrelay.state.request_record import RequestRecord, encode_record
from kvrelay.state.state_store import FOLLOW_MS, StateStore, owner_key, request_key
from tests.support import state_contract
from tests.support.redis_deployments import Deployment
from tests.support.redis_fixtures import make_record

deployment, connection, store = state_contract.deployment, state_contract.connection, state_contract.store

S = RequestState


async def hash_of(connection: RedisConnection, request_id: str = "r1") -> dict[bytes, bytes]:
    return await connection.run(lambda client: client.hgetall(f"kvrelay:{{{request_id}}}:request"))  # type: ignore[arg-type,return-value]


async def put(connection: RedisConnection, **fields: str | int) -> None:
    await connection.run(lambda client: client.hset("kvrelay:{r1}:request", mapping=fields))  # type: ignore[arg-type]


async def lose_everything(connection: RedisConnection) -> None:
    await connection.run(lambda client: client.flushall())


async def walk(store: StateStore, *states: RequestState, attempt: int = 1) -> None:
    for state in states:
        assert await store.transition("r1", attempt, state)


# --- records and moves


async def test_a_created_request_is_read_back(store: StateStore) -> None:
    record = make_record()
    assert await store.create(record)
    read = await store.get("r1")
    assert read is not None
    assert (read.prompt_token_ids, read.sampling, read.state) == (record.prompt_token_ids, record.sampling, S.QUEUED)
    assert 50_000 < read.remaining_ms <= 60_000


async def test_an_unknown_request_is_none(store: StateStore) -> None:
    assert await store.get("r1") is None


async def test_creating_again_is_harmless_and_another_request_with_the_id_is_refused(store: StateStore) -> None:
    assert await store.create(make_record())
    await walk(store, S.RESERVING)
    assert await store.create(make_record())
    assert not await store.create(make_record(gateway_id="g2"))
    read = await store.get("r1")
    assert read is not None
    assert (read.state, read.gateway_id) == (S.RESERVING, "g1")


async def test_the_script_allows_what_the_table_allows_and_nothing_else(
    store: StateStore, connection: RedisConnection
) -> None:
    await store.create(make_record())
    num_allowed = 0
    for source, target, step in itertools.product(S, S, (0, 1, 2)):
        await put(connection, state=source.value, attempt=4)
        try:
            moved = await store.transition("r1", 4, target, new_attempt=4 + step)
        except StateLostError:
            moved = False
        repeated = source is target and step == 0
        assert moved == (check_edge(source, 4, target, 4 + step) or repeated), (source, target, step)
        stored = await hash_of(connection)
        expected = (target, 4 + step) if moved else (source, 4)
        assert (S(stored[b"state"].decode()), int(stored[b"attempt"])) == expected
        num_allowed += moved
    assert num_allowed > len(S)


async def test_a_move_sets_fields_and_its_repeat_is_true(store: StateStore) -> None:
    await store.create(make_record())
    await walk(store, S.RESERVING)
    for _ in range(2):
        assert await store.transition(
            "r1", 1, S.PREFILLING, fields={"prefill_worker_id": "p1", "decode_worker_id": "d1"}
        )
    read = await store.get("r1")
    assert read is not None
    assert (read.state, read.prefill_worker_id, read.decode_worker_id) == (S.PREFILLING, "p1", "d1")


async def test_a_zombie_of_an_older_attempt_changes_nothing(store: StateStore, connection: RedisConnection) -> None:
    await store.create(make_record())
    await walk(store, S.RESERVING, S.PREFILLING)
    assert await store.transition("r1", 1, S.QUEUED, new_attempt=2)
    before = await hash_of(connection)
    assert not await store.transition("r1", 1, S.TRANSFERRING)
    assert not await store.transition("r1", 1, S.FAILED, fields={"error_message": "zombie"})
    with pytest.raises(SupersededError):
        await store.append_frames("r1", 1, 0, [b"zombie"])
    assert await hash_of(connection) == before


async def test_another_owner_changes_nothing_unless_it_names_the_owner(
    store: StateStore, connection: RedisConnection
) -> None:
    await store.create(make_record())
    other = StateStore(connection, "g2")
    before = await hash_of(connection)
    assert not await other.transition("r1", 1, S.RESERVING)
    with pytest.raises(SupersededError):
        await other.append_frames("r1", 1, 0, [b"x"])
    assert await hash_of(connection) == before
    assert await other.transition("r1", 1, S.CANCELLED, owner="g1")
    assert not await store.transition("r1", 1, S.RESERVING)


@pytest.mark.parametrize("end", sorted(TERMINAL_STATES, key=str))
async def test_a_final_state_stays(store: StateStore, connection: RedisConnection, end: RequestState) -> None:
    await store.create(make_record())
    await walk(store, S.RESERVING, S.PREFILLING, end)
    before = await hash_of(connection)
    for target in set(S) - {end}:
        assert not await store.transition("r1", 1, target)
    assert not await store.transition("r1", 1, S.QUEUED, new_attempt=2)
    assert await store.transition("r1", 1, end)
    assert await hash_of(connection) == before


async def test_of_many_moves_at_once_one_wins(store: StateStore) -> None:
    await store.create(make_record())
    ends = [S.FAILED, S.CANCELLED, S.EXPIRED] * 5
    results = await asyncio.gather(*(store.transition("r1", 1, end) for end in ends))
    read = await store.get("r1")
    assert read is not None
    assert [end for end, won in zip(ends, results, strict=True) if won] == [read.state] * 5


async def test_every_key_has_a_time_to_live(
    store: StateStore, connection: RedisConnection, deployment: Deployment
) -> None:
    await store.create(make_record())
    await store.append_frames("r1", 1, 0, [b"a"])
    await store.claim_idempotency_key("t", "k", "d", "r1", 60_000)
    await store.share_cache_secret(b"secret")
    keys = await deployment.keys()
    assert len(keys) == 7
    for key in keys:
        left_ms = await connection.run(lambda client, key=key: client.pttl(key))  # type: ignore[misc]
        assert 50_000 < left_ms <= 3_660_000
    await walk(store, S.CANCELLED)
    for key in (b"kvrelay:{r1}:request", b"kvrelay:{r1}:log"):
        left_ms = await connection.run(lambda client, key=key: client.pttl(key))  # type: ignore[misc]
        assert 590_000 < left_ms <= 600_000


# --- what an ended request leaves


@pytest.mark.parametrize("by_restoring", [False, True])
@pytest.mark.parametrize("keeps_output", [False, True])
async def test_an_ended_request_leaves_no_prompt_and_its_output_only_where_it_is_kept(
    store: StateStore, connection: RedisConnection, deployment: Deployment, keeps_output: bool, by_restoring: bool
) -> None:
    record = make_record(
        keeps_output=keeps_output,
        prompt_token_ids=tuple(range(70_000, 70_020)),
        sampling=SamplingParams(seed=1, max_tokens=8, stop=("a secret stop",)),
    )
    await store.create(record)
    await store.append_frames("r1", 1, 0, [b"a secret answer"])
    assert b"secret" in await everything(connection, deployment)
    if by_restoring:
        assert await store.restore(replace(record, state=S.SUCCEEDED), [b"a secret answer"])
    else:
        await walk(store, S.RESERVING, S.PREFILLING, S.SUCCEEDED)
    log_ms = await connection.run(lambda client: client.pttl("kvrelay:{r1}:log"))
    assert (590_000 if keeps_output else 0) < log_ms <= (600_000 if keeps_output else FOLLOW_MS)
    await connection.run(lambda client: client.delete("kvrelay:{r1}:log"))
    left = await everything(connection, deployment)
    assert b"secret" not in left
    assert not any(number.to_bytes(4, "little") in left for number in record.prompt_token_ids)
    read = await store.get("r1")
    assert read is not None
    assert (read.state, read.num_prompt_tokens, read.keeps_output) == (S.SUCCEEDED, 3, keeps_output)


async def test_a_request_of_an_older_gateway_keeps_its_output(store: StateStore, connection: RedisConnection) -> None:
    await store.create(make_record(keeps_output=False))
    await connection.run(lambda client: client.hdel("kvrelay:{r1}:request", "keeps_output"))
    await walk(store, S.CANCELLED)
    assert await connection.run(lambda client: client.pttl("kvrelay:{r1}:log")) > 590_000


async def test_a_long_log_that_is_restored_in_parts_never_runs_without_its_prompt(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(state=S.SUCCEEDED)
    seen: list[RequestRecord | None] = []
    restore_part = store._restore_part

    async def watched(*arguments: Any) -> bool:
        written = await restore_part(*arguments)
        seen.append(await store.get("r1"))
        return written

    monkeypatch.setattr(store, "_restore_part", watched)
    assert await store.restore(record, [b"frame"] * 1500)
    running, ended = seen
    assert running is not None
    assert ended is not None
    assert (running.state, running.prompt_token_ids) == (S.DECODING, record.prompt_token_ids)
    assert (ended.state, ended.prompt_token_ids) == (S.SUCCEEDED, (0,))


async def everything(connection: RedisConnection, deployment: Deployment) -> bytes:
    """All keys, and the values of hashes and streams."""
    keys = await deployment.keys()
    values: list[bytes] = []
    for key in keys:
        kind = await connection.run(lambda client, key=key: client.type(key))  # type: ignore[misc]
        if kind == b"hash":
            values += [*(await connection.run(lambda client, key=key: client.hgetall(key))).values()]  # type: ignore[misc]
        elif kind == b"stream":
            entries = await connection.run(lambda client, key=key: client.xrange(key))  # type: ignore[misc]
            values += [value for _, fields in entries for value in fields.values()]
    return b"\n".join([*keys, *values])


# --- writes that Redis lost


async def test_the_owner_writes_again_what_redis_lost(store: StateStore, connection: RedisConnection) -> None:
    await store.create(make_record())
    await lose_everything(connection)
    with pytest.raises(StateLostError):
        await store.transition("r1", 1, S.RESERVING)
    with pytest.raises(StateLostError):
        await store.append_frames("r1", 1, 0, [b"a"])
    assert await store.restore(make_record(state=S.DECODING, num_output_tokens=2), [b"a", b"b"])
    assert await store.append_frames("r1", 1, 2, [b"c"]) == 3
    assert await store.transition("r1", 1, S.SUCCEEDED)
    assert await store.read_frames("r1", 0, 10) == ([b"a", b"b", b"c"], S.SUCCEEDED)
    assert (await store.list_requests(10)).requests[0].num_output_tokens == 2


async def test_an_older_dump_is_brought_up_to_date(store: StateStore, connection: RedisConnection) -> None:
    await store.create(make_record())
    await store.append_frames("r1", 1, 0, [b"a"])
    await walk(store, S.RESERVING)
    with pytest.raises(StateLostError):
        await store.transition("r1", 1, S.DECODING)
    with pytest.raises(StateLostError):
        await store.transition("r1", 3, S.RESERVING)
    with pytest.raises(FrameGapError) as caught:
        await store.append_frames("r1", 1, 3, [b"d"])
    assert caught.value.num_frames == 1
    assert await store.restore(make_record(state=S.SUCCEEDED, attempt=3), [b"a", b"b", b"c"])
    assert await store.restore(make_record(state=S.SUCCEEDED, attempt=3), [b"a", b"b", b"c"])
    assert await store.read_frames("r1", 0, 10) == ([b"a", b"b", b"c"], S.SUCCEEDED)


async def test_restoring_never_takes_an_attempt_back(store: StateStore, connection: RedisConnection) -> None:
    await store.create(make_record())
    other = StateStore(connection, "g2")
    assert await other.take_over("r1", "g1", 1) is not None
    before = await hash_of(connection)
    assert not await store.restore(make_record(state=S.DECODING), [b"zombie"])
    assert not await store.restore(make_record(state=S.DECODING, attempt=2), [b"zombie"])
    assert await hash_of(connection) == before
    assert await other.transition("r1", 2, S.FAILED)
    assert not await store.restore(make_record(state=S.DECODING, attempt=9), [])
    assert await store.read_frames("r1", 0, 10) == ([], S.FAILED)


@pytest.mark.parametrize("num_frames", [0, 1, 999, 1000, 1001, 20_000])
async def test_a_log_of_any_length_is_restored(store: StateStore, num_frames: int) -> None:
    frames = [str(number).encode() for number in range(num_frames)]
    for _ in range(2):
        assert await store.restore(make_record(state=S.SUCCEEDED), frames)
    assert await store.read_frames("r1", 0, 30_000) == (frames, S.SUCCEEDED)


async def test_a_part_of_a_long_log_is_completed(store: StateStore) -> None:
    frames = [str(number).encode() for number in range(2500)]
    await store.create(make_record())
    await store.append_frames("r1", 1, 0, frames[:1500])
    assert await store.restore(make_record(state=S.DECODING), frames)
    assert await store.read_frames("r1", 0, 30_000) == (frames, S.DECODING)


# --- the log


async def test_frames_that_are_there_already_are_dropped(store: StateStore) -> None:
    await store.create(make_record())
    assert await store.append_frames("r1", 1, 0, [b"a", b"b"], num_output_tokens=2) == 2
    assert await store.append_frames("r1", 1, 1, [b"b", b"c", b"d"]) == 4
    assert await store.append_frames("r1", 1, 0, [b"a"]) == 4
    assert (await store.read_frames("r1", 0, 10))[0] == [b"a", b"b", b"c", b"d"]
    assert (await store.read_frames("r1", 1, 2))[0] == [b"b", b"c"]
    read = await store.get("r1")
    assert read is not None
    assert read.num_output_tokens == 2


async def test_frames_survive_any_bytes(store: StateStore) -> None:
    await store.create(make_record())
    frames = [bytes(range(256)), b"\r\n$-1\r\n", b"", b"end"]
    await store.append_frames("r1", 1, 0, frames)
    assert (await store.read_frames("r1", 0, 10))[0] == frames


async def test_overlapping_writers_make_one_log(store: StateStore) -> None:
    await store.create(make_record())
    frames = [str(number).encode() for number in range(30)]

    async def write(position: int) -> None:
        while True:
            try:
                await store.append_frames("r1", 1, position, frames[position : position + 7])
            except FrameGapError:
                continue
            return

    await asyncio.gather(*(write(position) for position in range(30)))
    assert (await store.read_frames("r1", 0, 100))[0] == frames


async def test_an_ended_log_takes_nothing_more_but_knows_its_own_frames(store: StateStore) -> None:
    await store.create(make_record())
    await store.append_frames("r1", 1, 0, [b"a"])
    await walk(store, S.CANCELLED)
    assert await store.append_frames("r1", 1, 0, [b"a"]) == 1
    with pytest.raises(SupersededError):
        await store.append_frames("r1", 1, 1, [b"b"])


async def test_a_follower_gets_frames_as_they_come_and_then_the_end(
    store: StateStore, connection: RedisConnection
) -> None:
    await store.create(make_record())
    await walk(store, S.RESERVING, S.PREFILLING, S.DECODING)
    follower = StateStore(connection, "g2")

    async def follow() -> list[bytes]:
        followed: list[bytes] = []
        state = S.DECODING
        while state is S.DECODING:
            frames, state = await follower.read_frames("r1", len(followed), 3, wait_ms=100_000)
            followed += frames
        assert state is S.SUCCEEDED
        return followed

    following = [asyncio.create_task(follow()) for _ in range(20)]
    expected = [str(number).encode() for number in range(10)]
    for position, frame in enumerate(expected):
        await store.append_frames("r1", 1, position, [frame])
    await walk(store, S.SUCCEEDED)
    async with asyncio.timeout(60):  # less than one wait: the end wakes them
        assert await asyncio.gather(*following) == [expected] * 20


async def test_a_final_state_comes_with_the_last_frames_only(store: StateStore) -> None:
    await store.create(make_record())
    await walk(store, S.RESERVING, S.PREFILLING)
    await store.append_frames("r1", 1, 0, [b"a", b"b", b"c"])
    await walk(store, S.SUCCEEDED)
    assert await store.read_frames("r1", 0, 2, wait_ms=5000) == ([b"a", b"b"], S.DECODING)
    assert await store.read_frames("r1", 2, 2, wait_ms=5000) == ([b"c"], S.SUCCEEDED)
    assert await store.read_frames("r1", 3, 2, wait_ms=5000) == ([], S.SUCCEEDED)


async def test_following_a_silent_request_returns_within_its_wait(store: StateStore) -> None:
    await store.create(make_record())
    started = asyncio.get_running_loop().time()
    assert await store.read_frames("r1", 0, 10, wait_ms=100) == ([], S.QUEUED)
    assert asyncio.get_running_loop().time() - started > 0.09


async def test_a_missing_request_is_not_a_finished_one(store: StateStore) -> None:
    with pytest.raises(RequestNotFoundError):
        await store.read_frames("r1", 0, 10, wait_ms=100)


# --- the list


async def test_pages_list_all_requests_newest_first_each_once(store: StateStore) -> None:
    # Three share each millisecond, so that pages end within one.
    records = [make_record(f"{number:04}", create_time_ms=1000 + number // 3) for number in range(25)]
    for record in records:
        await store.create(record)
    for page_size in (1, 2, 7, 25, 100):
        listed: list[str] = []
        token = ""
        while True:
            page = await store.list_requests(page_size, token)
            assert len(page.requests) <= page_size
            listed += [summary.request_id for summary in page.requests]
            token = page.next_page_token
            if not token:
                break
        assert listed == sorted((record.request_id for record in records), reverse=True)


async def test_a_tenants_pages_have_its_own_requests_only(store: StateStore) -> None:
    for number in range(40):
        await store.create(make_record(f"{number:04}", create_time_ms=1000 + number // 3, tenant="abc"[number % 3]))
    for number, tenant in enumerate("abc"):
        listed: list[str] = []
        token = ""
        while True:
            page = await store.list_requests(5, token, tenant=tenant)
            listed += [summary.request_id for summary in page.requests]
            token = page.next_page_token
            if not token:
                break
        assert listed == [f"{each:04}" for each in reversed(range(40)) if each % 3 == number]
    assert not (await store.list_requests(5, tenant="")).requests


async def test_only_active_requests_are_listed_when_asked(store: StateStore) -> None:
    for number in range(12):
        await store.create(make_record(str(number), create_time_ms=1000 + number))
        if number % 4:
            await store.transition(str(number), 1, S.CANCELLED)
    listed: list[str] = []
    token = ""
    while True:
        page = await store.list_requests(2, token, active_only=True)
        listed += [summary.request_id for summary in page.requests]
        token = page.next_page_token
        if not token:
            break
    assert listed == ["8", "4", "0"]


async def test_forgotten_requests_are_skipped_and_cleaned(store: StateStore, connection: RedisConnection) -> None:
    for number in range(4):
        await store.create(make_record(str(number), create_time_ms=1000 + number))
    await connection.run(lambda client: client.delete("kvrelay:{1}:request", "kvrelay:{2}:request"))
    assert [summary.request_id for summary in (await store.list_requests(10)).requests] == ["3", "0"]
    assert await num_listed(connection) == 2


async def num_listed(connection: RedisConnection, tenant: str | None = None) -> int:
    keys = [list_key(bucket, tenant) for bucket in range(NUM_BUCKETS)]
    return sum([await connection.run(lambda client, key=key: client.zcard(key)) for key in keys])  # type: ignore[misc]


async def test_the_list_stays_bounded_when_nobody_reads_it(store: StateStore, connection: RedisConnection) -> None:
    ids = [f"r{number}" for number in range(5 * ADDS_PER_CLEANING * NUM_BUCKETS) if bucket_of(f"r{number}") == 3]
    assert len(ids) > 4 * ADDS_PER_CLEANING
    for number, request_id in enumerate(ids):
        await store.create(make_record(request_id, create_time_ms=1000 + number))
        key = request_key(request_id)
        await connection.run(lambda client, key=key: client.delete(key))  # type: ignore[misc]
    assert await num_listed(connection) <= ADDS_PER_CLEANING
    assert await num_listed(connection, "tenant") <= ADDS_PER_CLEANING


async def test_the_list_is_shared_by_all_buckets_and_a_bucket_is_in_one_slot(
    store: StateStore, connection: RedisConnection
) -> None:
    for number in range(100):
        await store.create(make_record(f"r{number}"))
    for tenant in (None, "tenant"):
        keys = [list_key(bucket, tenant) for bucket in range(NUM_BUCKETS)]
        counts = [await connection.run(lambda client, key=key: client.zcard(key)) for key in keys]  # type: ignore[misc]
        assert sum(counts) == 100
        assert min(counts) > 0
    slots = [{key_slot(list_key(bucket, tenant).encode()) for tenant in (None, "t")} for bucket in range(NUM_BUCKETS)]
    assert {len(each) for each in slots} == {1}
    shards = {next(iter(each)) * 3 // 16_384 for each in slots}
    assert shards == {0, 1, 2}, "three primaries share it"


@pytest.mark.parametrize("tenant", [None, "tenant"])
async def test_what_gateways_before_buckets_listed_is_listed_in_its_place(
    store: StateStore, connection: RedisConnection, tenant: str | None
) -> None:
    """A rolling upgrade: old gateways go on listing while new ones do."""
    ids = [f"{number:03}" for number in range(60)]
    for number, request_id in enumerate(ids):
        record = make_record(request_id, create_time_ms=1000 + number // 3)
        if number % 2:
            await store.create(record)
            if number % 3:
                continue
        else:
            # As an old gateway: the record, without the list of today.
            await connection.run_script("create", [request_key(request_id), owner_key(request_id)], as_created(record))
        for key in (OLD_LIST_KEY, old_list_key_of("tenant")):
            await connection.run_script("index", [key], (record.create_time_ms, request_id, 60_000))
    for page_size in (1, 7, 100):
        listed: list[str] = []
        token = ""
        while True:
            page = await store.list_requests(page_size, token, tenant=tenant)
            listed += [summary.request_id for summary in page.requests]
            token = page.next_page_token
            if not token:
                break
        assert listed == list(reversed(ids))


def as_created(record: RequestRecord) -> tuple[str | int | bytes, ...]:
    return record.gateway_id, record.create_time_ms, record.remaining_ms, 60_000, *encode_record(record)


async def test_an_old_list_is_cleaned_by_readers_and_expires(store: StateStore, connection: RedisConnection) -> None:
    for number in range(3):
        await connection.run_script("index", [OLD_LIST_KEY], (1000 + number, f"gone{number}", 60_000))
    assert 0 < await connection.run(lambda client: client.pttl(OLD_LIST_KEY)) <= 60_000
    assert not (await store.list_requests(10)).requests
    assert not await connection.run(lambda client: client.exists(OLD_LIST_KEY))


async def test_many_requests_of_one_millisecond_are_listed_once_each(store: StateStore) -> None:
    ids = sorted(f"r{number}" for number in range(400))
    for request_id in ids:
        await store.create(make_record(request_id, create_time_ms=1000))
    listed: list[str] = []
    token = ""
    while True:
        page = await store.list_requests(50, token)
        listed += [summary.request_id for summary in page.requests]
        token = page.next_page_token
        if not token:
            break
    assert listed == ids[::-1]


@pytest.mark.parametrize("token", ["x", "-", "1-", "99999999999999999999-a"])
async def test_a_page_token_that_is_none_is_the_clients_mistake(store: StateStore, token: str) -> None:
    with pytest.raises(InvalidRequestError, match="page_token"):
        await store.list_requests(10, token)


# --- what gateways and tenants may know


async def test_the_tenant_of_a_request_is_one_small_read(store: StateStore, deployment: Deployment) -> None:
    await store.create(make_record(tenant="bank"))
    await deployment.num_calls("hget")
    assert await store.tenant_of("r1") == "bank"
    assert await store.tenant_of("unknown") is None
    assert await deployment.num_calls("hget") == 2
    await store.tenant_of("r1")
    assert await deployment.num_calls("hgetall") == 0


async def test_gateways_agree_on_the_first_ones_secret(store: StateStore, connection: RedisConnection) -> None:
    others = [StateStore(connection, f"g{number}") for number in range(2, 6)]
    secrets = await asyncio.gather(
        *(each.share_cache_secret(bytes([number])) for number, each in enumerate([store, *others]))
    )
    assert len(set(secrets)) == 1
    await lose_everything(connection)
    assert await others[0].share_cache_secret(b"again") == b"again"


# --- takeover


async def test_a_dead_gateways_request_is_taken_over_with_all_it_needs(
    store: StateStore, connection: RedisConnection
) -> None:
    record = make_record(resumable=True, cache_salt="salt")
    await store.create(record)
    await walk(store, S.RESERVING, S.PREFILLING)
    await store.append_frames("r1", 1, 0, [b"a"])
    other = StateStore(connection, "g2")
    taken = await other.take_over("r1", "g1", 1)
    assert taken is not None
    assert (taken.gateway_id, taken.attempt, taken.state) == ("g2", 2, S.QUEUED)
    assert (taken.prompt_token_ids, taken.sampling, taken.cache_salt) == (
        record.prompt_token_ids,
        record.sampling,
        "salt",
    )
    assert 50_000 < taken.remaining_ms <= 60_000
    assert not await store.transition("r1", 1, S.SUCCEEDED)
    assert await other.append_frames("r1", 2, 1, [b"b"]) == 2


async def test_of_many_gateways_one_takes_over(store: StateStore, connection: RedisConnection) -> None:
    await store.create(make_record())
    # Twice each: a second call at the same gateway must not win either.
    stores = [StateStore(connection, f"g{2 + number // 2}") for number in range(10)]
    taken = await asyncio.gather(*(other.take_over("r1", "g1", 1) for other in stores))
    winners = [record for record in taken if record is not None]
    assert len(winners) == 1
    assert await store.get("r1") is not None
    assert not await store.transition("r1", 1, S.RESERVING)


@pytest.mark.parametrize(("owner", "attempt"), [("g3", 1), ("g1", 2), ("g1", 0)])
async def test_a_request_that_is_not_as_expected_is_not_taken_over(
    store: StateStore, connection: RedisConnection, owner: str, attempt: int
) -> None:
    await store.create(make_record())
    assert await StateStore(connection, "g2").take_over("r1", owner, attempt) is None


async def test_an_ended_request_is_not_taken_over(store: StateStore, connection: RedisConnection) -> None:
    await store.create(make_record())
    await walk(store, S.FAILED)
    assert await StateStore(connection, "g2").take_over("r1", "g1", 1) is None


# --- idempotency keys


async def test_of_fifty_claims_at_once_one_is_the_owner(store: StateStore) -> None:
    claims = await asyncio.gather(*(store.claim_idempotency_key("t", "k", "body", f"r{n}", 60_000) for n in range(50)))
    assert len(set(claims)) == 1


async def test_a_key_with_another_body_is_a_conflict(store: StateStore) -> None:
    await store.claim_idempotency_key("t", "k", "body", "r1", 60_000)
    with pytest.raises(IdempotencyConflictError):
        await store.claim_idempotency_key("t", "k", "other body", "r2", 60_000)


async def test_keys_of_two_tenants_are_two_keys(store: StateStore) -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc"), ("é", "{}")]
    claims = [
        await store.claim_idempotency_key(tenant, key, "body", f"r{n}", 60_000) for n, (tenant, key) in enumerate(pairs)
    ]
    assert claims == [f"r{n}" for n in range(len(pairs))]


async def test_a_released_key_is_free_and_only_its_owner_releases_it(store: StateStore) -> None:
    await store.claim_idempotency_key("t", "k", "body", "r1", 60_000)
    await store.release_idempotency_key("t", "k", "r2")
    assert await store.claim_idempotency_key("t", "k", "body", "r2", 60_000) == "r1"
    await store.release_idempotency_key("t", "k", "r1")
    assert await store.claim_idempotency_key("t", "k", "other", "r2", 60_000) == "r2"


# --- out of memory


async def test_a_full_redis_refuses_new_jobs_and_lets_running_job_end(
    store: StateStore, deployment: Deployment
) -> None:
    await store.create(make_record())
    await store.append_frames("r1", 1, 0, [b"a"])
    await walk(store, S.RESERVING, S.PREFILLING)
    await deployment.limit_memory("1mb")
    with pytest.raises(StoreFullError, match="out of memory"):
        await fill(store)
    with pytest.raises(StoreFullError):
        await store.create(make_record("new"))
    with pytest.raises(StoreFullError):
        await store.claim_idempotency_key("t", "k", "body", "new", 60_000)
    with pytest.raises(StoreFullError):
        await store.append_frames("r1", 1, 1, [b"b"])
    assert store.healthy
    assert await store.transition("r1", 1, S.SUCCEEDED)
    assert await store.read_frames("r1", 0, 10) == ([b"a"], S.SUCCEEDED)
    await deployment.limit_memory("64mb")
    assert await store.create(make_record("new"))


async def fill(store: StateStore) -> None:
    big: tuple[int, ...] = (1,) * 50_000
    for number in range(100):
        record: RequestRecord = make_record(f"big{number}", prompt_token_ids=big, num_prompt_tokens=len(big))
        await store.create(record)


async def test_a_long_page_never_keeps_the_loop_for_long(store: StateStore) -> None:
    num_requests = 1000
    for number in range(num_requests):
        assert await store.create(make_record(str(number), create_time_ms=number + 1))
    delays: list[float] = []
    delay = LoopDelay(delays.append)
    pages = await asyncio.gather(*(store.list_requests(num_requests) for _ in range(2)))
    delay.stop()
    assert [len(page.requests) for page in pages] == [num_requests] * 2
    assert max(delays) < 0.1
