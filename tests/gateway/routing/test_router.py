"""Placement of jobs."""

from dataclasses import replace

from gateway.routing.router import Assignment, RouteQuery, WorkerView, choose_workers
from kvrelay.core.job import WorkerLoad
from kvrelay.core.member import MemberRole
from kvrelay.core.model_spec import KVLayout, ModelSpec

MODEL = ModelSpec("tiny", "llama", KVLayout(2, 2, 16, "float32"), 320, 512, (0,), "f1")
ROOMY = WorkerLoad(num_free_blocks=100, num_blocks=100)
QUERY = RouteQuery("f1", num_tokens=20)


def worker(
    worker_id: str, role: MemberRole = MemberRole.DECODE, load: WorkerLoad = ROOMY, num_assigned: int = 0
) -> WorkerView:
    return WorkerView(worker_id, role, "host:1", MODEL, 16, 512, load, num_assigned)


def prefill(worker_id: str, num_queued: int = 0) -> WorkerView:
    return worker(worker_id, MemberRole.PREFILL, WorkerLoad(num_queued_prompt_tokens=num_queued))


def test_the_least_busy_workers_are_chosen() -> None:
    busy = replace(ROOMY, num_running=3)
    workers = [worker("d1", load=busy), worker("d2"), prefill("p1", 500), prefill("p2", 10)]
    assert choose_workers(workers, QUERY) == Assignment("d2", "p2")


def test_a_fast_prefill_worker_is_chosen_until_its_queue_takes_longer() -> None:
    def at_rate(worker_id: str, tokens_per_s: float, num_queued: int) -> WorkerView:
        load = WorkerLoad(num_queued_prompt_tokens=num_queued, prefill_tokens_per_s=tokens_per_s)
        return worker(worker_id, MemberRole.PREFILL, load)

    slow = at_rate("p1", 1000, 0)
    num_tokens = QUERY.num_tokens
    for num_queued, chosen in ((0, "p2"), (9 * num_tokens - 1, "p2"), (9 * num_tokens + 1, "p1")):
        workers = [worker("d1"), slow, at_rate("p2", 10_000, num_queued)]
        assert choose_workers(workers, QUERY) == Assignment("d1", chosen)
    unmeasured = at_rate("p3", 0.0, 0)
    assert choose_workers([worker("d1"), slow, unmeasured], QUERY) == Assignment("d1", "p3")


def test_without_a_prefill_worker_the_decode_worker_is_alone() -> None:
    assert choose_workers([worker("d1")], QUERY) == Assignment("d1", None)


def test_without_a_decode_worker_there_is_no_assignment() -> None:
    workers = [
        replace(worker("other-model"), model=replace(MODEL, fingerprint="f2")),
        worker("draining", load=replace(ROOMY, draining=True)),
        worker("excluded"),
        replace(worker("too-small"), max_sequence_tokens=20),
        prefill("p1"),
    ]
    assert choose_workers(workers, replace(QUERY, excluded_worker_ids=frozenset({"excluded"}))) is None


def test_room_counts_more_than_a_short_batch() -> None:
    full = WorkerLoad(num_free_blocks=1, num_used_blocks=99, num_blocks=100)
    assert choose_workers(
        [worker("d1", load=full), worker("d2", load=replace(ROOMY, num_running=9))], QUERY
    ) == Assignment("d2", None)


def test_cached_blocks_count_as_room() -> None:
    cached = WorkerLoad(num_cached_blocks=100, num_blocks=100)
    assert choose_workers(
        [worker("d1", load=cached), worker("d2", load=replace(ROOMY, num_running=1))], QUERY
    ) == Assignment("d1", None)


def test_equal_workers_take_turns_before_their_next_report() -> None:
    assert choose_workers([worker("d1", num_assigned=1), worker("d2")], QUERY) == Assignment("d2", None)


def test_the_preferred_worker_is_taken_when_it_has_room() -> None:
    workers = [worker("d1"), worker("d2", load=replace(ROOMY, num_running=5))]
    query = replace(QUERY, preferred_decode_worker_id="d2")
    assert choose_workers(workers, query) == Assignment("d2", None)
    full = [worker("d1"), worker("d2", load=WorkerLoad())]
    assert choose_workers(full, query) == Assignment("d1", None)


def test_an_avoided_pair_is_not_chosen() -> None:
    workers = [worker("d1"), prefill("p1"), prefill("p2", 900)]
    query = replace(QUERY, avoided_pairs=frozenset({("d1", "p1")}))
    assert choose_workers(workers, query) == Assignment("d1", "p2")
    assert choose_workers(workers[:2], query) == Assignment("d1", None)


def test_another_decode_worker_is_preferred_to_local_prefill_during_a_cooldown() -> None:
    workers = [worker("d1"), worker("d2", load=replace(ROOMY, num_running=5)), prefill("p1")]
    query = replace(QUERY, avoided_pairs=frozenset({("d1", "p1")}))
    assert choose_workers(workers, query) == Assignment("d2", "p1")
    all_avoided = replace(QUERY, avoided_pairs=frozenset({("d1", "p1"), ("d2", "p1")}))
    assert choose_workers(workers, all_avoided) == Assignment("d1", None)
