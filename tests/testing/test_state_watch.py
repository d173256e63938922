"""Moves of stored states: which are seen, and which are violations."""

from typing import Any

import pytest

from kvrelay.core.request_state import RequestState
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.state_store import StateStore
from kvrelay.testing import wait_until
from kvrelay.testing.state_watch import StateHistory, StateWatch
from tests.support.redis_fixtures import make_record

KEY = "kvrelay:{r}:request"


def history_of(*writes: dict[str, Any]) -> StateHistory:
    history = StateHistory()
    for write in writes:
        history.on_write(KEY, {name: str(value) for name, value in write.items()})
    return history


def created(state: str = "QUEUED", attempt: int = 1) -> dict[str, Any]:
    return {"state": state, "attempt": attempt, "create_time_ms": 5}


def moved(state: str, attempt: int = 1) -> dict[str, Any]:
    return {"state": state, "attempt": attempt}


@pytest.mark.parametrize(
    "writes",
    [
        (
            created(),
            moved("RESERVING"),
            moved("PREFILLING"),
            moved("TRANSFERRING"),
            moved("DECODING"),
            moved("SUCCEEDED"),
        ),
        (created(), moved("RESERVING"), moved("QUEUED", 2), moved("RESERVING", 2), moved("EXPIRED", 2)),
        (created(), moved("RESERVING"), {"num_output_tokens": 4}, moved("RESERVING"), moved("CANCELLED")),
        # written again by its owner: what is between was lost
        (created(), moved("RESERVING"), created("DECODING")),
        (created(), moved("RESERVING"), created("DECODING", 3)),
    ],
)
def test_allowed_moves_are_counted(writes: tuple[dict[str, Any], ...]) -> None:
    history = history_of(*writes)
    assert not history.violations
    assert history.num_moves > 1


@pytest.mark.parametrize(
    "writes",
    [
        (created(), moved("PREFILLING")),
        (created(), moved("RESERVING", 2)),
        (created(), moved("QUEUED", 3)),
        (created(), moved("RESERVING"), moved("QUEUED")),
        (created(attempt=2), moved("QUEUED", 1)),
        (created(), moved("FAILED"), moved("SUCCEEDED")),
        (created(), moved("FAILED"), created()),
        (created("DECODING"), created("RESERVING")),
        (created("DECODING", 2), created("DECODING", 1)),
        (moved("RESERVING"),),
    ],
)
def test_other_moves_are_violations(writes: tuple[dict[str, Any], ...]) -> None:
    assert len(history_of(*writes).violations) == 1


async def test_what_the_store_writes_is_seen_and_what_redis_lost_is_forgotten() -> None:
    async with (
        EmbeddedValkey(on_tcp=True) as valkey,
        RedisConnection(valkey.url, timeout_ms=10_000) as connection,
    ):
        watch = StateWatch("127.0.0.1", valkey.port, valkey.password)
        await watch.start()
        store, record = StateStore(connection, "g1"), make_record(request_id="a" * 32)
        assert await store.create(record)
        assert await store.transition(record.request_id, 1, RequestState.RESERVING)
        await wait_until(lambda: watch.history.num_moves == 2, "both are seen", 30.0)
        await connection.run(lambda client: client.flushall())
        assert await store.create(record)
        await wait_until(lambda: watch.history.num_moves == 3, "the new one is seen", 30.0)
        await connection.run(
            lambda client: client.hset(f"kvrelay:{{{record.request_id}}}:request", "state", "DECODING")
        )
        await watch.stop()
    assert not watch.history.violations


def test_records_that_redis_got_back_from_a_dump_go_on_from_wherever_they_were() -> None:
    history = history_of(created(), moved("RESERVING"))
    history.forget()
    history.on_write(KEY, {name: str(value) for name, value in moved("PREFILLING").items()})
    assert not history.violations
    history.on_write(KEY, {name: str(value) for name, value in moved("RESERVING").items()})
    history.on_write("kvrelay:{new}:request", {name: str(value) for name, value in moved("PREFILLING").items()})
    assert len(history.violations) == 2, "back, and of a request that never began"
