"""The request lifecycle under random event orders, and case by case where the order matters."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import lifecycle_messages as m
from gateway.request_lifecycle import RequestLifecycle
from kvrelay import errors
from kvrelay.request_state import RequestState
from kvrelay.work import FailureKind, FinishReason, SequenceToken, Token, WorkId
from tests.gateway.lifecycle_simulation import PROMPT, Simulation, make_lifecycle, token_id_of

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
ALL_FAULTS = frozenset({"kill", "fail", "repeat", "skip", "stop", "cancel", "deadline"})
RECOVERABLE_FAULTS = frozenset({"kill", "fail", "repeat", "skip"})
FIRST = WorkId("a" * 32, 1)


@settings(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 2**32), lengths=LENGTHS, faults=st.sets(st.sampled_from(sorted(ALL_FAULTS))))
def test_invariants_hold_in_every_order_of_events(seed: int, lengths: list[int], faults: set[str]) -> None:
    Simulation(Random(seed), lengths, frozenset(faults)).run()


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**32), lengths=LENGTHS)
def test_a_request_succeeds_in_spite_of_faults_that_leave_workers(seed: int, lengths: list[int]) -> None:
    simulation = Simulation(Random(seed), lengths, RECOVERABLE_FAULTS)
    simulation.run()
    assert simulation.finishes[0].state is RequestState.SUCCEEDED


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4), data=st.data())
def test_a_taken_over_request_continues_at_the_next_index(seed: int, lengths: list[int], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    emitted = tuple(tuple(token_id_of(s, i) for i in range(count)) for s, count in enumerate(counts))
    finished = frozenset(s for s, count in enumerate(counts) if count == lengths[s])
    lifecycle = make_lifecycle(len(lengths), emitted=emitted, finished=finished, attempt=3)
    simulation = Simulation(Random(seed), lengths, RECOVERABLE_FAULTS, lifecycle)
    simulation.ended = set(finished)
    simulation.run()
    assert simulation.finishes[0].state is RequestState.SUCCEEDED


def test_a_transfer_that_fails_after_decoding_began_is_tried_again() -> None:
    lifecycle = make_lifecycle(2, emitted=((token_id_of(0, 0),), ()), attempt=3)
    simulation = Simulation(Random(291), [4, 3], RECOVERABLE_FAULTS, lifecycle)
    simulation.run()
    assert simulation.finishes[0].state is RequestState.SUCCEEDED


def test_simulated_faults_fire() -> None:
    counts: dict[str, int] = {}
    for seed in range(200):
        simulation = Simulation(Random(seed), [3, 4], ALL_FAULTS)
        simulation.run()
        for name, count in simulation.num_faults.items():
            counts[name] = counts.get(name, 0) + count
    assert counts.keys() == ALL_FAULTS


# --- case by case -------------------------------------------------------------------------------------------------------------


def token(index: int, sequence: int = 0, *, work_id: WorkId = FIRST, finish: FinishReason | None = None) -> SequenceToken:
    return SequenceToken(work_id, sequence, index, Token(token_id_of(sequence, index)), finish)


def reserved(lifecycle: RequestLifecycle, prefill: str | None = "p1", cached: int = 0) -> list[m.Action]:
    lifecycle.handle(m.Start())
    lifecycle.handle(m.Routed(FIRST, "d1", prefill))
    return lifecycle.handle(m.Reserved("d1", FIRST, b"ticket", "d1:1", cached))


def emitted(actions: list[m.Action]) -> list[int]:
    return [action.token.index for action in actions if isinstance(action, m.Emit)]


def cancels(actions: list[m.Action]) -> list[str]:
    return [action.worker_id for action in actions if isinstance(action, m.SendCancel)]


def finish_of(actions: list[m.Action]) -> m.Finish:
    (finish,) = (action for action in actions if isinstance(action, m.Finish))
    return finish


def test_a_later_token_that_arrives_first_waits_for_the_first_token() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    assert emitted(lifecycle.handle(m.DecodeStarted("d1", FIRST, 100))) == []
    assert emitted(lifecycle.handle(m.DecodeTokens("d1", (token(1),)))) == []
    assert emitted(lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))) == [0, 1]


def test_a_short_uncached_part_is_computed_by_the_decode_worker() -> None:
    lifecycle = make_lifecycle(1, local_prefill_tokens=2)
    actions = reserved(lifecycle, cached=len(PROMPT) - 1)
    assert m.SendRunPrompt("d1", FIRST) in actions
    assert lifecycle.report.prefilled_on_decode_worker


def test_a_long_uncached_part_goes_to_the_prefill_worker_with_the_ticket() -> None:
    lifecycle = make_lifecycle(1, local_prefill_tokens=2)
    actions = reserved(lifecycle, cached=1)
    (start,) = (action for action in actions if isinstance(action, m.SendStartPrefill))
    assert (start.worker_id, start.ticket, start.push_address, start.num_cached_tokens) == ("p1", b"ticket", "d1:1", 1)


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt() -> None:
    assert m.SendRunPrompt("d1", FIRST) in reserved(make_lifecycle(1), prefill=None)


def test_a_first_token_that_ends_the_request_cancels_the_reservation_only() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    actions = lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0, finish=FinishReason.STOP),)))
    assert emitted(actions) == [0]
    assert cancels(actions) == ["d1"]
    assert finish_of(actions).state is RequestState.SUCCEEDED


def test_a_stop_string_in_the_first_token_cancels_both_workers() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    assert sorted(cancels(lifecycle.handle(m.StopFound(0)))) == ["d1", "p1"]


def test_a_lost_prefill_worker_changes_nothing_once_the_sequences_run() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    lifecycle.handle(m.DecodeStarted("d1", FIRST, 100))
    assert lifecycle.handle(m.WorkerLost("p1")) == []
    assert lifecycle.attempt == 1


def test_a_prefill_worker_lost_after_its_tokens_leaves_the_word_to_the_decode_worker() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    (timer,) = lifecycle.handle(m.WorkerLost("p1"))
    assert isinstance(timer, m.StartTimer)
    lifecycle.handle(m.DecodeStarted("d1", FIRST, 100))
    assert lifecycle.handle(m.TimerFired(timer.attempt)) == []
    assert lifecycle.attempt == 1


def test_a_decode_worker_that_says_nothing_after_its_prefill_worker_died_is_given_up() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    lifecycle.handle(m.WorkerLost("p1"))
    actions = lifecycle.handle(m.TimerFired(1))
    assert cancels(actions) == ["d1"]
    assert lifecycle.attempt == 2


def test_recovery_takes_the_emitted_tokens_into_the_prompt() -> None:
    lifecycle = make_lifecycle(2)
    reserved(lifecycle, prefill=None)
    lifecycle.handle(m.DecodeTokens("d1", (token(0, 0), token(0, 1), token(1, 0))))
    routes = [action for action in lifecycle.handle(m.WorkerLost("d1")) if isinstance(action, m.Route)]
    assert [route.work.token_ids for route in routes] == [
        (*PROMPT, token_id_of(0, 0), token_id_of(0, 1)),
        (*PROMPT, token_id_of(1, 0)),
    ]
    assert [route.work.work_id for route in routes] == [WorkId("a" * 32, 2, 0), WorkId("a" * 32, 2, 1)]
    assert all(route.excluded_worker_ids == {"d1"} for route in routes)


def test_a_failed_transfer_avoids_the_pair_and_not_its_workers() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    actions = lifecycle.handle(m.WorkFailed("p1", FIRST, FailureKind.TRANSFER, "refused"))
    assert cancels(actions) == ["d1"]
    assert m.AvoidPair("d1", "p1") in actions
    (route,) = (action for action in actions if isinstance(action, m.Route))
    assert not route.excluded_worker_ids
    assert route.avoided_pairs == {("d1", "p1")}


def test_what_a_zombie_says_is_dropped() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.WorkerLost("p1"))
    assert lifecycle.attempt == 2
    for event in (
        m.PrefillDone("p1", FIRST, (token(0),)),
        m.DecodeTokens("d1", (token(1),)),
        m.WorkFailed("d1", FIRST, FailureKind.INTERNAL, ""),
        m.DecodeStarted("d1", FIRST),
    ):
        assert lifecycle.handle(event) == []


def test_another_workers_word_about_the_work_is_dropped() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    assert lifecycle.handle(m.PrefillDone("p2", FIRST, (token(0),))) == []
    assert lifecycle.handle(m.WorkFailed("d2", FIRST, FailureKind.INTERNAL, "")) == []
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    assert lifecycle.handle(m.DecodeTokens("d2", (token(1),))) == []


@pytest.mark.parametrize(
    ("event", "state", "error"),
    [
        (m.CancelRequested(), RequestState.CANCELLED, errors.CancelledRequestError),
        (m.DeadlinePassed(), RequestState.EXPIRED, errors.DeadlineError),
        (m.WorkFailed("d1", FIRST, FailureKind.DEADLINE, ""), RequestState.EXPIRED, errors.DeadlineError),
        (m.WorkFailed("d1", FIRST, FailureKind.INVALID, "no"), RequestState.FAILED, errors.InvalidRequestError),
    ],
)
def test_an_early_end_has_its_state_and_error(event: m.Event, state: RequestState, error: type[errors.KvrelayError]) -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    finish = finish_of(lifecycle.handle(event))
    assert finish.state is state
    assert type(finish.error) is error
    assert lifecycle.handle(m.CancelRequested()) == []


def test_full_workers_are_asked_again_later_and_at_last_the_client_is_told() -> None:
    lifecycle = make_lifecycle(1, max_attempts=2)
    lifecycle.handle(m.Start())
    delays = []
    for attempt in range(1, 12):
        work_id = WorkId("a" * 32, attempt)
        lifecycle.handle(m.Routed(work_id, "d1", None))
        lifecycle.handle(m.WorkFailed("d1", work_id, FailureKind.OUT_OF_CAPACITY, "full"))
        (later,) = lifecycle.handle(m.NoWorker(WorkId("a" * 32, attempt + 1)))
        assert isinstance(later, m.RetryLater)
        delays.append(later.delay_ms)
        (route,) = lifecycle.handle(m.RouteAgain())
        assert isinstance(route, m.Route)
        assert route.excluded_worker_ids == frozenset()
    assert delays == sorted(delays)
    assert delays[-1] == 1000
    lifecycle.handle(m.NoWorker(WorkId("a" * 32, 12)))
    assert isinstance(finish_of(lifecycle.handle(m.GiveUpWaiting())).error, errors.OverloadedError)


def test_a_request_that_loses_every_attempt_fails_in_the_end() -> None:
    lifecycle = make_lifecycle(1, max_attempts=3)
    lifecycle.handle(m.Start())
    actions: list[m.Action] = []
    for attempt in range(1, 4):
        lifecycle.handle(m.Routed(WorkId("a" * 32, attempt), f"d{attempt}", None))
        actions = lifecycle.handle(m.WorkerLost(f"d{attempt}"))
    assert isinstance(finish_of(actions).error, errors.UnavailableError)


def test_a_worker_that_knows_a_newer_attempt_gets_the_next_one() -> None:
    """A gateway that took the request over counts on from what the store knows, and the dead one had come further."""
    lifecycle = make_lifecycle(1, attempt=2)
    lifecycle.handle(m.Start())
    lifecycle.handle(m.Routed(WorkId("a" * 32, 2), "d1", None))
    *_, route = lifecycle.handle(m.WorkFailed("d1", WorkId("a" * 32, 2), FailureKind.SUPERSEDED, "known already"))
    assert isinstance(route, m.Route)
    assert route.work.work_id.attempt == 3
    assert route.excluded_worker_ids == frozenset()


def test_the_end_waits_a_moment_for_the_report_on_the_transfer() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.DecodeTokens("d1", (token(1, finish=FinishReason.LENGTH),)))
    (*_, timer) = lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    assert isinstance(timer, m.StartTimer)
    actions = lifecycle.handle(m.TransferDone("p1", FIRST, 64, 2.0, 1.0))
    assert finish_of(actions).state is RequestState.SUCCEEDED
    assert lifecycle.report.transfer_bytes == 64


def test_a_prefill_workers_failure_during_the_wait_for_its_report_ends_the_wait() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.DecodeTokens("d1", (token(1, finish=FinishReason.LENGTH),)))
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    actions = lifecycle.handle(m.WorkFailed("p1", FIRST, FailureKind.TRANSFER, "late"))
    assert finish_of(actions).state is RequestState.SUCCEEDED


def test_a_prefill_workers_failure_changes_nothing_once_the_sequences_run() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0),)))
    lifecycle.handle(m.DecodeStarted("d1", FIRST, 100))
    assert lifecycle.handle(m.WorkFailed("p1", FIRST, FailureKind.TRANSFER, "acknowledgement lost")) == []


def test_a_stop_string_in_a_first_token_is_told_when_the_sequences_run() -> None:
    lifecycle = make_lifecycle(2)
    reserved(lifecycle)
    lifecycle.handle(m.PrefillDone("p1", FIRST, (token(0, 0), token(0, 1))))
    assert lifecycle.handle(m.StopFound(1)) == []
    assert m.SendFinishSequence("d1", FIRST, 1) in lifecycle.handle(m.DecodeStarted("d1", FIRST, 100))


def test_a_work_that_a_stop_string_ended_is_cancelled_while_others_of_the_request_run() -> None:
    lifecycle = make_lifecycle(2)
    reserved(lifecycle, prefill=None)
    lifecycle.handle(m.DecodeTokens("d1", (token(0, 0), token(0, 1))))
    lifecycle.handle(m.WorkerLost("d1"))
    works = [WorkId("a" * 32, 2, sequence) for sequence in range(2)]
    for work_id, worker_id in zip(works, ("d2", "d3"), strict=True):
        lifecycle.handle(m.Routed(work_id, worker_id, None))
        lifecycle.handle(m.Reserved(worker_id, work_id, b"", "", 0))
        lifecycle.handle(m.DecodeStarted(worker_id, work_id))
    assert lifecycle.handle(m.StopFound(1)) == [m.SendCancel("d3", works[1])]


@pytest.mark.parametrize("sequence", [1, 7, 2**32 - 1])
@pytest.mark.parametrize("from_prefill_worker", [True, False])
def test_a_token_of_a_sequence_that_the_request_does_not_have_costs_its_worker_the_attempt(
    sequence: int, from_prefill_worker: bool
) -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    work_id = WorkId("a" * 32, 1)
    lifecycle.handle(m.Routed(work_id, "d1", "p1" if from_prefill_worker else None))
    lifecycle.handle(m.Reserved("d1", work_id, b"t", "d1", 0))
    tokens = (SequenceToken(work_id, sequence, 0, Token(7)),)
    actions = lifecycle.handle(m.PrefillDone("p1", work_id, tokens) if from_prefill_worker else m.DecodeTokens("d1", tokens))
    assert not any(isinstance(action, m.Emit) for action in actions)
    assert lifecycle.attempt == 2
    (route,) = (action for action in actions if isinstance(action, m.Route))
    assert route.excluded_worker_ids == {"p1" if from_prefill_worker else "d1"}
