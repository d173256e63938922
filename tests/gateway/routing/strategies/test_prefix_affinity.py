"""Which workers have the first token soonest, by what they have cached."""

from collections import Counter
from dataclasses import replace
from random import Random

from gateway.routing.conditional_disaggregation import HANDOFF_TOKENS
from gateway.routing.router import Assignment, RouteQuery, WorkerView
from gateway.routing.strategies.prefix_affinity import JOB_TOKENS, PrefixStrategy
from kvrelay.core.job import WorkerLoad
from kvrelay.core.member import MemberRole
from tests.gateway.routing.test_router import QUERY, ROOMY, worker

LONG = replace(QUERY, num_tokens=400)


def choose(workers: list[WorkerView], query: RouteQuery, seed: int = 0) -> Assignment | None:
    return PrefixStrategy(Random(seed).random).choose(workers, query)


def always(workers: list[WorkerView], query: RouteQuery) -> Assignment | None:
    (chosen,) = {choose(workers, query, seed) for seed in range(40)}
    return chosen


def prefill(worker_id: str, num_queued: int = 0) -> WorkerView:
    return worker(worker_id, MemberRole.PREFILL, WorkerLoad(num_queued_prompt_tokens=num_queued))


def test_of_idle_workers_those_that_have_the_prompt_are_taken() -> None:
    workers = [worker("d1"), worker("d2"), prefill("p1"), prefill("p2")]
    query = replace(LONG, cached_tokens={"d2": 384, "p2": 384})
    assert always(workers, query) == Assignment("d2", "p2")
    assert always([*workers, worker("d3"), prefill("p0")], query) == Assignment("d2", "p2")


def test_a_queue_longer_than_what_is_cached_sends_the_prompt_elsewhere() -> None:
    cached = {"p1": 384}
    near = [worker("d1"), prefill("p1", 300), prefill("p2")]
    far = [worker("d1"), prefill("p1", 500), prefill("p2")]
    assert always(near, replace(LONG, cached_tokens=cached)) == Assignment("d1", "p1")
    assert always(far, replace(LONG, cached_tokens=cached)) == Assignment("d1", "p2")


def test_a_slow_worker_must_have_more_of_the_prompt() -> None:
    def with_rate(each: WorkerView, rate: float) -> WorkerView:
        return replace(each, load=replace(each.load, prefill_tokens_per_s=rate))

    query = replace(LONG, cached_tokens={"p1": 240})
    equal = [worker("d1"), with_rate(prefill("p1"), 1000), with_rate(prefill("p2"), 1000)]
    slow = [worker("d1"), with_rate(prefill("p1"), 300), with_rate(prefill("p2"), 1000)]
    assert always(equal, query) == Assignment("d1", "p1")
    assert always(slow, query) == Assignment("d1", "p2")


def test_a_crowded_decode_worker_is_left_for_an_idle_one() -> None:
    def workers(num_running: int) -> list[WorkerView]:
        return [worker("d1", load=replace(ROOMY, num_running=num_running)), worker("d2")]

    query = replace(LONG, cached_tokens={"d1": 384})
    num_too_many = 2 * LONG.num_tokens // JOB_TOKENS
    assert always(workers(2), query) == Assignment("d1", None)
    assert always(workers(num_too_many), query) == Assignment("d2", None)


def test_what_the_decode_worker_has_need_not_be_sent() -> None:
    """The prompt comes from the prefill worker either way."""
    query = replace(LONG, num_tokens=2000, cached_tokens={"p1": 1984, "d2": 1984})
    workers = [replace(each, max_sequence_tokens=4096) for each in (worker("d1"), worker("d2"), prefill("p1"))]
    roomy = [replace(each, load=replace(each.load, num_free_blocks=200)) for each in workers]
    assert always(roomy, query) == Assignment("d2", "p1")


def test_room_counts_more_than_what_is_cached() -> None:
    workers = [worker("d1", load=WorkerLoad()), worker("d2", load=replace(ROOMY, num_running=1))]
    assert always(workers, replace(QUERY, cached_tokens={"d1": 16})) == Assignment("d2", None)


def test_an_avoided_pair_is_not_chosen_for_its_cache() -> None:
    workers = [worker("d1"), prefill("p1"), prefill("p2", HANDOFF_TOKENS)]
    query = replace(LONG, cached_tokens={"p1": 384}, avoided_pairs=frozenset({("d1", "p1")}))
    assert always(workers, query) == Assignment("d1", "p2")


def test_among_workers_that_are_as_good_gateways_spread() -> None:
    """What every worker has cached, a system prompt, gives none of them everything."""
    workers = [worker(f"d{number}") for number in range(8)]
    query = replace(LONG, cached_tokens={f"d{number}": 384 for number in range(8)})
    chosen = Counter(choose(workers, query, seed) for seed in range(400))
    assert len(chosen) >= 7
    assert max(chosen.values()) < 200
