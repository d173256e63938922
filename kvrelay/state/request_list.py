"""The lists of requests, newest first, by pages: one of all, and one of each tenant.

A list is spread over NUM_BUCKETS sorted sets by creation time, so that a cluster's nodes share it.
Requests expire by themselves; readers and writers remove their ids.
"""

import hashlib
import re
from binascii import crc_hqx
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from kvrelay.core.request_state import is_terminal
from kvrelay.errors import InvalidRequestError, UnreadableStateError
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.redis_examination import execute
from kvrelay.state.redis_faults import fault_of
from kvrelay.state.request_record import SUMMARY_FIELDS, RequestSummary, decode_summary

NUM_SLOTS = 16_384
"""Of a Redis Cluster."""
NUM_BUCKETS = 16
"""Part of the keys: versions with another number list nothing of each other's."""
OLD_LIST_KEY = "kvrelay:{requests}:by_create_time"
"""One sorted set, of gateways before there were buckets. It is read until it has expired."""
READ_BEYOND_SHARE = 8
"""Buckets are uneven: more than its part of a page is read of each, by this."""
MAX_COUNTED_LISTS = 4096
ADDS_PER_CLEANING = 32
MAX_CLEANED = 2 * ADDS_PER_CLEANING
MAX_LOOKS_PER_PAGE = 4
READ_AT_ONCE = 50
"""Redis' answers to one batch are parsed without a pause."""
MAX_LISTED_MS = 10**15 - 1
"""Largest time of a page token."""
_TOKEN = re.compile(r"([0-9]{1,15})-(.{1,128})")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RequestPage:
    """May be short, even empty, and have a next one."""

    requests: list[RequestSummary]
    next_page_token: str
    """Empty on the last page."""


@dataclass(frozen=True, slots=True)
class _Position:
    """A page continues after it. Equal times are ordered by descending id."""

    create_time_ms: int
    request_id: str
    key: str = field(default="", compare=False)
    """Of the sorted set that has it."""

    def precedes(self, other: "_Position") -> bool:
        return (self.create_time_ms, self.request_id) > (other.create_time_ms, other.request_id)


class RequestList:
    """Calls are bounded and raise as `RedisConnection.run`."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._num_added: Counter[str] = Counter()

    async def add(self, request_id: str, tenant: str, create_time_ms: int, time_to_live_ms: int) -> None:
        """Idempotent."""
        bucket = bucket_of(request_id)
        keys = (list_key(bucket), list_key(bucket, tenant))
        await self._connection.run_script("index", keys, (create_time_ms, request_id, time_to_live_ms))
        for key in keys:
            if key not in self._num_added and len(self._num_added) >= MAX_COUNTED_LISTS:
                self._num_added.clear()
            self._num_added[key] += 1
            if self._num_added[key] % ADDS_PER_CLEANING == 0:
                await self._connection.run(partial(_clean, key=key))

    async def read_page(
        self, page_size: int, page_token: str, active_only: bool, tenant: str | None = None
    ) -> RequestPage:
        """See `StateStore.list_requests`."""
        position = _decode_token(page_token) if page_token else None
        found: list[RequestSummary] = []
        for _ in range(MAX_LOOKS_PER_PAGE):
            entries = await self._read_after(tenant, position, page_size)
            summaries = await self._read_summaries(entries)
            for entry, summary in zip(entries, summaries, strict=True):
                position = entry
                if summary is not None and not (active_only and is_terminal(summary.state)):
                    found.append(summary)
                    if len(found) == page_size:
                        return RequestPage(found, _encode_token(position))
            if len(entries) < page_size:
                return RequestPage(found, "")
        return RequestPage(found, _encode_token(position) if position else "")

    async def _read_after(self, tenant: str | None, position: _Position | None, count: int) -> list[_Position]:
        """The newest `count` of all buckets."""
        keys = [list_key(bucket, tenant) for bucket in range(NUM_BUCKETS)]
        keys.append(OLD_LIST_KEY if tenant is None else old_list_key_of(tenant))
        buckets = [_Bucket(key, position) for key in keys]
        share = count // NUM_BUCKETS + READ_BEYOND_SHARE
        found: list[_Position] = []
        while len(found) < count:
            # What is unread of an empty bucket may be newer than all that is read of the others.
            while empty := [bucket for bucket in buckets if bucket.has_more and not bucket.entries]:
                await self._connection.run(partial(_read_entries, buckets=empty, count=share))
            with_entries = [bucket for bucket in buckets if bucket.entries]
            if not with_entries:
                break
            entry = max(with_entries, key=_Bucket.newest_entry).entries.popleft()
            if not found or found[-1] != entry:  # an older gateway may have listed it too
                found.append(entry)
        return found

    async def _read_summaries(self, entries: Sequence[_Position]) -> list[RequestSummary | None]:
        if not entries:
            return []
        now_ms = await self._connection.run_script("clock", [entries[0].key], ())
        summaries: list[RequestSummary | None] = []
        for begin in range(0, len(entries), READ_AT_ONCE):
            part = entries[begin : begin + READ_AT_ONCE]
            summaries += await self._connection.run(partial(_read_summaries, entries=part, now_ms=now_ms))
        return summaries


def bucket_of(request_id: str) -> int:
    return hashlib.blake2b(request_id.encode(), digest_size=1).digest()[0] % NUM_BUCKETS


def list_key(bucket: int, tenant: str | None = None) -> str:
    """Of all requests or of one tenant's; both in one slot of a cluster."""
    of_tenant = "" if tenant is None else f":{_digest(tenant)}"
    return f"kvrelay:{{{_hash_tags()[bucket]}}}:by_create_time{of_tenant}"


@cache
def _hash_tags() -> tuple[str, ...]:
    """The first one for each equal part of a cluster's slots, so that primaries share them evenly."""
    tags: dict[int, str] = {}
    for number in count():
        tag = f"requests.{number}"
        slot = crc_hqx(tag.encode(), 0) % NUM_SLOTS
        tags.setdefault(slot * NUM_BUCKETS // NUM_SLOTS, tag)
        if len(tags) == NUM_BUCKETS:
            break
    return tuple(tags[bucket] for bucket in range(NUM_BUCKETS))


def old_list_key_of(tenant: str) -> str:
    return f"kvrelay:{{requests:{_digest(tenant)}}}:by_create_time"


def _digest(tenant: str) -> str:
    # Clients may choose it.
    return hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()


class _Bucket:
    """One sorted set while a page is read."""

    def __init__(self, key: str, position: _Position | None) -> None:
        self.key = key
        self.entries: deque[_Position] = deque()
        self.has_more = True
        self._position = position
        self._newest: int | str = "+inf" if position is None else position.create_time_ms
        self._offset = 0

    def newest_entry(self) -> tuple[int, str]:
        return self.entries[0].create_time_ms, self.entries[0].request_id

    def command(self, count: int) -> tuple[str | int, ...]:
        # Starts with the position's whole millisecond: what came before may have ended within it.
        limits = ("BYSCORE", "REV", "LIMIT", self._offset, count, "WITHSCORES")
        return "ZRANGE", self.key, self._newest, "-inf", *limits

    def take(self, answer: Sequence[object], count: int) -> None:
        listed = [_Position(_milliseconds(score), _text(name), self.key) for name, score in _pairs(answer)]
        self.entries += [entry for entry in listed if self._position is None or self._position.precedes(entry)]
        self.has_more = len(listed) == count
        if not listed:
            return
        if self._position is None or self._position.precedes(listed[-1]):
            self._position = listed[-1]
        is_within = listed[-1].create_time_ms == self._newest
        self._offset = self._offset + len(listed) if is_within else 0
        self._newest = listed[-1].create_time_ms


async def _read_entries(client: Redis, buckets: Sequence[_Bucket], count: int) -> None:
    pipeline: Any = client.pipeline(transaction=False)
    for bucket in buckets:
        pipeline.execute_command(*bucket.command(count))
    answers = await pipeline.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    for bucket, answer in zip(buckets, answers, strict=True):
        bucket.take(answer, count)


async def _read_summaries(client: Redis, entries: Sequence[_Position], now_ms: int) -> list[RequestSummary | None]:
    pipeline = client.pipeline(transaction=False)
    for entry in entries:
        pipeline.hmget(f"kvrelay:{{{entry.request_id}}}:request", SUMMARY_FIELDS)
    # Errors of single keys are answers: a foreign value must not hide the other requests.
    answers = await pipeline.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception) and not (isinstance(answer, ResponseError) and fault_of(answer) is None):
            raise answer  # no matter what the key holds
    summaries: list[RequestSummary | None] = []
    expired: defaultdict[str, list[str]] = defaultdict(list)
    for entry, values in zip(entries, answers, strict=True):
        try:
            if isinstance(values, ResponseError):
                raise UnreadableStateError(str(values))
            summaries.append(decode_summary(values, now_ms))
        except UnreadableStateError as error:
            _log.warning(
                "unreadable request in the state store",
                request_id=entry.request_id,
                problem=repr(error.__cause__ or error),
            )
            summaries.append(None)
        else:
            if summaries[-1] is None:
                expired[entry.key].append(entry.request_id)
    for key, request_ids in expired.items():
        await execute(client, "ZREM", key, *request_ids)
    return summaries


async def _clean(client: Redis, key: str) -> None:
    oldest = await execute(client, "ZRANGE", key, 0, MAX_CLEANED - 1)
    await _read_summaries(client, [_Position(0, _text(request_id), key) for request_id in oldest], now_ms=0)


def _pairs(answer: Sequence[object]) -> list[tuple[object, str]]:
    # Some versions of redis-py pair ids and scores, others leave the answer flat.
    if answer and isinstance(answer[0], (tuple, list)):
        return [(entry[0], _text(entry[1])) for entry in answer if isinstance(entry, (tuple, list))]
    return [(answer[index], _text(answer[index + 1])) for index in range(0, len(answer), 2)]


def _milliseconds(score: str) -> int:
    return int(min(max(float(score), 0.0), MAX_LISTED_MS))


def _text(value: object) -> str:
    # Undecodable bytes are not our id, and their replacement names no request.
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _encode_token(position: _Position) -> str:
    return f"{position.create_time_ms}-{position.request_id}"


def _decode_token(token: str) -> _Position:
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise InvalidRequestError("page_token", "is none that this server gave; start again without one")
    return _Position(int(match[1]), match[2])
