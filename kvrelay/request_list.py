"""The list of all requests in Redis, newest first, and reading it page by page. Part of `kvrelay.state_store`.

It is a sorted set of request ids by creation time. The requests expire on their own; their ids are cleaned up by readers and, so
that the list stays bounded where nobody reads, by those who add.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from kvrelay.errors import InvalidRequestError, UnreadableStateError
from kvrelay.redis_connection import RedisConnection, execute
from kvrelay.request_record import SUMMARY_FIELDS, RequestSummary, decode_summary
from kvrelay.request_state import is_terminal

LIST_KEY = "kvrelay:{requests}:by_create_time"
ADDS_PER_CLEANING = 32
MAX_CLEANED = 2 * ADDS_PER_CLEANING
MAX_LOOKS_PER_PAGE = 4
MAX_LISTED_MS = 10**15 - 1
"""Largest time of a page token."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RequestPage:
    """Requests, newest first. A page may be short, even empty, and still have a next one."""

    requests: list[RequestSummary]
    next_page_token: str
    """Empty on the last page."""


@dataclass(frozen=True, slots=True)
class _Position:
    """An entry of the list; pages continue after it. Entries of one millisecond are in descending order of their ids."""

    create_time_ms: int
    request_id: str

    def precedes(self, other: "_Position") -> bool:
        """Whether this is listed before the other."""
        return (self.create_time_ms, self.request_id) > (other.create_time_ms, other.request_id)


class RequestList:
    """Adds to the list and reads it. Every call is bounded and raises as `RedisConnection.run` does."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._num_added = 0

    async def add(self, request_id: str, create_time_ms: int, time_to_live_ms: int) -> None:
        """Lists a request; repeating it is harmless."""
        await self._connection.run_script("index", [LIST_KEY], (create_time_ms, request_id, time_to_live_ms))
        self._num_added += 1
        if self._num_added % ADDS_PER_CLEANING == 0:
            await self._connection.run(_clean)

    async def read_page(self, page_size: int, page_token: str, active_only: bool) -> RequestPage:
        """One page; `StateStore.list_requests` says more."""
        position = _decode_token(page_token) if page_token else None
        found: list[RequestSummary] = []
        for _ in range(MAX_LOOKS_PER_PAGE):
            entries, summaries = await self._read_after(position, page_size)
            for entry, summary in zip(entries, summaries, strict=True):
                position = entry
                if summary is not None and not (active_only and is_terminal(summary.state)):
                    found.append(summary)
                    if len(found) == page_size:
                        return RequestPage(found, _encode_token(position))
            if len(entries) < page_size:
                return RequestPage(found, "")
        return RequestPage(found, _encode_token(position) if position else "")

    async def _read_after(self, position: _Position | None, count: int) -> tuple[list[_Position], list[RequestSummary | None]]:
        entries = await self._connection.run(lambda client: _read_entries(client, position, count))
        if not entries:
            return [], []
        summaries = await self._connection.run(lambda client: _read_summaries(client, [entry.request_id for entry in entries]))
        return entries, summaries


async def _read_entries(client: Redis, position: _Position | None, count: int) -> list[_Position]:
    newest = "+inf" if position is None else position.create_time_ms
    entries: list[_Position] = []
    offset = 0
    while len(entries) < count:
        # Starts with the whole millisecond of the position, of which some were on the page before.
        arguments = (LIST_KEY, newest, "-inf", "BYSCORE", "REV", "LIMIT", offset, count, "WITHSCORES")
        answer = await execute(client, "ZRANGE", *arguments)
        listed = [_Position(_milliseconds(score), _text(request_id)) for request_id, score in _pairs(answer)]
        entries += [entry for entry in listed if position is None or position.precedes(entry)]
        if len(listed) < count:
            break
        offset += count
    return entries[:count]


async def _read_summaries(client: Redis, request_ids: Sequence[str]) -> list[RequestSummary | None]:
    pipeline = client.pipeline(transaction=False)
    pipeline.time()
    for request_id in request_ids:
        pipeline.hmget(f"kvrelay:{{{request_id}}}:request", SUMMARY_FIELDS)
    # Errors of single keys are among the answers: one that holds something else must not hide all other requests.
    (seconds, microseconds), *answers = await pipeline.execute(raise_on_error=False)
    now_ms = seconds * 1000 + microseconds // 1000
    summaries: list[RequestSummary | None] = []
    expired: list[str] = []
    for request_id, values in zip(request_ids, answers, strict=True):
        try:
            if isinstance(values, ResponseError):
                raise UnreadableStateError(str(values))
            summaries.append(decode_summary(values, now_ms))
        except UnreadableStateError as error:
            _log.warning("unreadable request in the state store", request_id=request_id, problem=repr(error.__cause__ or error))
            summaries.append(None)
        else:
            expired += [request_id] if summaries[-1] is None else []
    if expired:
        await execute(client, "ZREM", LIST_KEY, *expired)
    return summaries


async def _clean(client: Redis) -> None:
    oldest = await execute(client, "ZRANGE", LIST_KEY, 0, MAX_CLEANED - 1)
    await _read_summaries(client, [_text(request_id) for request_id in oldest])


def _pairs(answer: Sequence[object]) -> list[tuple[object, str]]:
    # redis-py pairs ids and scores for some commands and versions and leaves the flat answer for others.
    if answer and isinstance(answer[0], (tuple, list)):
        return [(entry[0], _text(entry[1])) for entry in answer if isinstance(entry, (tuple, list))]
    return [(answer[index], _text(answer[index + 1])) for index in range(0, len(answer), 2)]


def _milliseconds(score: str) -> int:
    """A score as a time that page tokens can hold."""
    return int(min(max(float(score), 0.0), MAX_LISTED_MS))


def _text(value: object) -> str:
    # Bytes that are no text are no id of ours; what they are replaced by names no request either.
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _encode_token(position: _Position) -> str:
    return f"{position.create_time_ms}-{position.request_id}"


def _decode_token(token: str) -> _Position:
    match = re.fullmatch(r"(\d{1,15})-(.{1,128})", token)
    if match is None:
        raise InvalidRequestError("page_token", "is none that this server gave; start again without one")
    return _Position(int(match[1]), match[2])
