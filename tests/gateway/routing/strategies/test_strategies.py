"""What every strategy keeps to, and what each is for."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.router import Assignment, RouteQuery, WorkerView, choose_workers
from gateway.routing.routing import STRATEGIES
from gateway.routing.strategies.round_robin import RoundRobinStrategy
from gateway.routing.strategies.session_affinity import SessionStrategy
from gateway.routing.strategies.two_choices import TwoChoicesStrategy
from kvrelay.core.job import WorkerLoad
from kvrelay.core.member import MemberRole
from tests.gateway.routing.test_router import MODEL, QUERY, ROOMY, prefill, worker

SEED = 7


def decode_workers(number: int) -> list[WorkerView]:
    return [worker(f"d{each}") for each in range(number)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_keeps_to_what_can_be_chosen(name: str) -> None:
    strategy = STRATEGIES[name](Random(SEED).random)
    query = replace(
        QUERY,
        excluded_worker_ids=frozenset({"excluded"}),
        avoided_pairs=frozenset({("d1", "p1"), ("d2", "p2")}),
        session_key="key",
        cached_tokens=dict.fromkeys(["other", "draining", "excluded", "small", "full", "d1", "p1"], 16),
    )
    unfit = [
        replace(worker("other"), model=replace(MODEL, fingerprint="f2")),
        worker("draining", load=replace(ROOMY, draining=True)),
        worker("excluded"),
        replace(worker("small"), max_sequence_tokens=20),
    ]
    assert strategy.choose([*unfit, prefill("p1")], query) is None
    fit = [worker("d1"), worker("d2"), worker("full", load=WorkerLoad(num_blocks=9)), prefill("p1"), prefill("p2")]
    for _ in range(50):
        assert strategy.choose([*unfit, *fit], query) in (Assignment("d1", "p2"), Assignment("d2", "p1"))
        alone = strategy.choose([*unfit, *fit], replace(query, on_one_worker=True))
        assert alone in (Assignment("d1", None), Assignment("d2", None))


def test_turns_go_round_though_workers_come_and_go() -> None:
    strategy, workers = RoundRobinStrategy(), decode_workers(3)
    workers += [prefill("p1"), prefill("p2")]
    chosen = [strategy.choose(workers, QUERY) for _ in range(4)]
    assert chosen == [Assignment(*pair) for pair in (("d0", "p1"), ("d1", "p2"), ("d2", "p1"), ("d0", "p2"))]
    assert strategy.choose(workers[1:], QUERY) == Assignment("d1", "p1")
    assert strategy.choose([workers[0], *workers[3:]], QUERY) == Assignment("d0", "p2")


def test_of_two_drawn_workers_the_less_busy_is_taken() -> None:
    strategy = TwoChoicesStrategy(Random(SEED).random)
    workers = [worker(f"d{number}", load=replace(ROOMY, num_running=number)) for number in range(4)]
    chosen = Counter(strategy.choose(workers, QUERY) for _ in range(4000))
    # Of six pairs, the idlest is in three, and the busiest never the better one.
    shares = [chosen[Assignment(f"d{number}", None)] / 4000 for number in range(4)]
    assert shares == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0], abs=0.04)


def test_prefill_workers_are_drawn_too() -> None:
    strategy = TwoChoicesStrategy(Random(SEED).random)
    workers = [worker("d1"), *(prefill(f"p{number}", 100 * number) for number in range(3))]
    chosen = Counter(strategy.choose(workers, QUERY) for _ in range(300))
    assert set(chosen) == {Assignment("d1", "p0"), Assignment("d1", "p1")}


def test_gateways_that_see_the_same_do_not_all_choose_the_same() -> None:
    workers = decode_workers(8)
    by_load = Counter(choose_workers(workers, QUERY) for _ in range(80))
    by_two = Counter(TwoChoicesStrategy(Random(seed).random).choose(workers, QUERY) for seed in range(80))
    assert max(by_load.values()) == 80
    assert max(by_two.values()) < 40


def session(key: str, salt: str = "s") -> RouteQuery:
    return replace(QUERY, session_key=key, cache_salt=salt)


def test_a_session_stays_where_it_is_when_other_workers_come_and_go() -> None:
    strategy, workers = SessionStrategy(), [*decode_workers(8), *(prefill(f"p{number}") for number in range(4))]
    keys = [f"key {number}" for number in range(400)]
    before = {key: strategy.choose(workers, session(key)) for key in keys}
    busy = [replace(each, load=replace(each.load, num_running=number)) for number, each in enumerate(workers)]
    assert {key: strategy.choose(busy, session(key)) for key in keys} == before
    without = {key: strategy.choose(workers[1:], session(key)) for key in keys}
    moved = [key for key in keys if without[key] != before[key]]
    assert moved
    assert all(assignment is not None for assignment in before.values())
    assert {assignment.decode_worker_id for key in moved if (assignment := before[key])} == {"d0"}
    counts = Counter(assignment.decode_worker_id for assignment in before.values() if assignment)
    assert max(counts.values()) < 2 * len(keys) / 8


def test_tenants_with_the_same_key_do_not_share_its_worker() -> None:
    strategy, workers = SessionStrategy(), decode_workers(64)
    assert strategy.choose(workers, session("key", "a")) != strategy.choose(workers, session("key", "b"))


def test_a_full_worker_gives_its_sessions_to_others() -> None:
    strategy, workers = SessionStrategy(), decode_workers(4)
    first = strategy.choose(workers, session("key"))
    assert first is not None
    full = [replace(each, load=WorkerLoad()) if each.worker_id == first.decode_worker_id else each for each in workers]
    second = strategy.choose(full, session("key"))
    assert second is not None
    assert second != first


def test_without_a_key_the_load_decides() -> None:
    workers = [worker("d1", load=replace(ROOMY, num_running=1)), worker("d2")]
    assert SessionStrategy().choose(workers, QUERY) == choose_workers(workers, QUERY) == Assignment("d2", None)


LOADS = st.builds(
    WorkerLoad,
    num_running=st.integers(0, 3),
    num_waiting=st.integers(0, 2),
    num_queued_prompt_tokens=st.integers(0, 500),
    num_free_blocks=st.integers(0, 9),
)
WORKERS = st.lists(
    st.builds(
        worker,
        worker_id=st.integers(0, 9).map(str),
        role=st.sampled_from([MemberRole.DECODE, MemberRole.PREFILL]),
        load=LOADS,
        num_assigned=st.integers(0, 2),
    ),
    unique_by=lambda each: each.worker_id,
)


@given(WORKERS, st.sets(st.tuples(st.integers(0, 9).map(str), st.integers(0, 9).map(str))))
def test_prefix_routing_without_hits_is_routing_by_load(
    workers: list[WorkerView], avoided: set[tuple[str, str]]
) -> None:
    query = replace(QUERY, avoided_pairs=frozenset(avoided), cached_tokens={"gone": 16})
    strategy = STRATEGIES["prefix"](Random(SEED).random)
    assert strategy.choose(workers, query) == choose_workers(workers, query)


@pytest.mark.parametrize("name", STRATEGIES)
@given(workers=WORKERS, cached=st.dictionaries(st.integers(0, 9).map(str), st.integers(1, 19)))
def test_a_worker_is_found_whenever_there_is_one(name: str, workers: list[WorkerView], cached: dict[str, int]) -> None:
    query = replace(QUERY, cached_tokens=cached, session_key="key")
    chosen = STRATEGIES[name](Random(SEED).random).choose(workers, query)
    by_load = choose_workers(workers, query)
    assert (chosen is None) == (by_load is None)
    if chosen is not None and by_load is not None:
        assert (chosen.prefill_worker_id is None) == (by_load.prefill_worker_id is None)
