"""The request lifecycle under random event orders, and single cases in which order matters."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.lifecycle import events
from gateway.lifecycle.lifecycle import RequestLifecycle
from kvrelay import errors
from kvrelay.core.job import FailureKind, FinishReason, JobId, SequenceToken, Token
from kvrelay.core.request_state import RequestState
from tests.support.lifecycle_simulation import PROMPT, Simulation, make_lifecycle, token_id_of

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
ALL_FAULTS = frozenset({"kill", "fail", "repeat", "skip", "stop", "cancel", "deadline"})
RECOVERABLE_FAULTS = frozenset({"kill", "fail", "repeat", "skip"})
FIRST = JobId("a" * 32, 1)


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


# --- case by case ---------------------------------------------------------------------------------


def token(index: int, sequence: int = 0, *, job_id: JobId = FIRST, finish: FinishReason | None = None) -> SequenceToken:
    return SequenceToken(job_id, sequence, index, Token(token_id_of(sequence, index)), finish)


def reserved(lifecycle: RequestLifecycle, prefill: str | None = "p1", cached: int = 0) -> list[events.Action]:
    lifecycle.handle(events.Started())
    lifecycle.handle(events.Routed(FIRST, "d1", prefill))
    return lifecycle.handle(events.Reserved("d1", FIRST, b"ticket", "d1:1", cached))


def emitted(actions: list[events.Action]) -> list[int]:
    return [action.token.index for action in actions if isinstance(action, events.Emit)]


def cancels(actions: list[events.Action]) -> list[str]:
    return [action.worker_id for action in actions if isinstance(action, events.SendCancel)]


def finish_of(actions: list[events.Action]) -> events.Finish:
    (finish,) = (action for action in actions if isinstance(action, events.Finish))
    return finish


def test_a_later_token_that_arrives_first_waits_for_the_first_token() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    assert emitted(lifecycle.handle(events.DecodeStarted("d1", FIRST, 100))) == []
    assert emitted(lifecycle.handle(events.DecodeTokens("d1", (token(1),)))) == []
    assert emitted(lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))) == [0, 1]


def test_a_short_uncached_part_is_computed_by_the_decode_worker() -> None:
    lifecycle = make_lifecycle(1, local_prefill_tokens=2)
    actions = reserved(lifecycle, cached=len(PROMPT) - 1)
    assert events.SendRunPrompt("d1", FIRST) in actions
    assert lifecycle.report.prefilled_on_decode_worker


def test_a_long_uncached_part_goes_to_the_prefill_worker_with_the_ticket() -> None:
    lifecycle = make_lifecycle(1, local_prefill_tokens=2)
    actions = reserved(lifecycle, cached=1)
    (start,) = (action for action in actions if isinstance(action, events.SendStartPrefill))
    assert (start.worker_id, start.ticket, start.push_address, start.num_cached_tokens) == ("p1", b"ticket", "d1:1", 1)


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt() -> None:
    assert events.SendRunPrompt("d1", FIRST) in reserved(make_lifecycle(1), prefill=None)


def test_a_first_token_that_ends_the_request_cancels_the_reservation_only() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    actions = lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0, finish=FinishReason.STOP),)))
    assert emitted(actions) == [0]
    assert cancels(actions) == ["d1"]
    assert finish_of(actions).state is RequestState.SUCCEEDED


def test_a_stop_string_in_the_first_token_cancels_both_workers() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    assert sorted(cancels(lifecycle.handle(events.StopFound(0)))) == ["d1", "p1"]


def test_a_lost_prefill_worker_changes_nothing_once_the_sequences_run() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    lifecycle.handle(events.DecodeStarted("d1", FIRST, 100))
    assert lifecycle.handle(events.WorkerLost("p1")) == []
    assert lifecycle.attempt == 1


def test_after_a_lost_prefill_workers_tokens_the_decode_worker_decides() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    (timer,) = lifecycle.handle(events.WorkerLost("p1"))
    assert isinstance(timer, events.StartTimer)
    lifecycle.handle(events.DecodeStarted("d1", FIRST, 100))
    assert lifecycle.handle(events.TimerFired(timer.attempt)) == []
    assert lifecycle.attempt == 1


def test_a_silent_decode_worker_is_cancelled_after_its_prefill_worker_died() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    lifecycle.handle(events.WorkerLost("p1"))
    actions = lifecycle.handle(events.TimerFired(1))
    assert cancels(actions) == ["d1"]
    assert lifecycle.attempt == 2


def test_recovery_takes_the_emitted_tokens_into_the_prompt() -> None:
    lifecycle = make_lifecycle(2)
    reserved(lifecycle, prefill=None)
    lifecycle.handle(events.DecodeTokens("d1", (token(0, 0), token(0, 1), token(1, 0))))
    routes = [action for action in lifecycle.handle(events.WorkerLost("d1")) if isinstance(action, events.Route)]
    assert [route.job.token_ids for route in routes] == [
        (*PROMPT, token_id_of(0, 0), token_id_of(0, 1)),
        (*PROMPT, token_id_of(1, 0)),
    ]
    assert [route.job.job_id for route in routes] == [JobId("a" * 32, 2, 0), JobId("a" * 32, 2, 1)]
    assert all(route.excluded_worker_ids == {"d1"} for route in routes)


def test_a_failed_transfer_avoids_the_pair_and_not_its_workers() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    actions = lifecycle.handle(events.JobFailed("p1", FIRST, FailureKind.TRANSFER, "refused"))
    assert cancels(actions) == ["d1"]
    assert events.AvoidPair("d1", "p1") in actions
    (route,) = (action for action in actions if isinstance(action, events.Route))
    assert not route.excluded_worker_ids
    assert route.avoided_pairs == {("d1", "p1")}


def test_events_of_a_zombie_are_dropped() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.WorkerLost("p1"))
    assert lifecycle.attempt == 2
    for event in (
        events.PrefillDone("p1", FIRST, (token(0),)),
        events.DecodeTokens("d1", (token(1),)),
        events.JobFailed("d1", FIRST, FailureKind.INTERNAL, ""),
        events.DecodeStarted("d1", FIRST),
    ):
        assert lifecycle.handle(event) == []


def test_events_of_another_worker_about_the_job_are_dropped() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    assert lifecycle.handle(events.PrefillDone("p2", FIRST, (token(0),))) == []
    assert lifecycle.handle(events.JobFailed("d2", FIRST, FailureKind.INTERNAL, "")) == []
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    assert lifecycle.handle(events.DecodeTokens("d2", (token(1),))) == []


@pytest.mark.parametrize(
    ("event", "state", "error"),
    [
        (events.CancelRequested(), RequestState.CANCELLED, errors.CancelledRequestError),
        (events.DeadlinePassed(), RequestState.EXPIRED, errors.DeadlineError),
        (events.JobFailed("d1", FIRST, FailureKind.DEADLINE, ""), RequestState.EXPIRED, errors.DeadlineError),
        (events.JobFailed("d1", FIRST, FailureKind.INVALID, "no"), RequestState.FAILED, errors.InvalidRequestError),
    ],
)
def test_an_early_end_has_its_state_and_error(
    event: events.Event, state: RequestState, error: type[errors.KvrelayError]
) -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    finish = finish_of(lifecycle.handle(event))
    assert finish.state is state
    assert type(finish.error) is error
    assert lifecycle.handle(events.CancelRequested()) == []


def test_full_workers_are_retried_and_at_last_the_request_fails() -> None:
    lifecycle = make_lifecycle(1, max_attempts=2)
    lifecycle.handle(events.Started())
    delays = []
    for attempt in range(1, 12):
        job_id = JobId("a" * 32, attempt)
        lifecycle.handle(events.Routed(job_id, "d1", None))
        lifecycle.handle(events.JobFailed("d1", job_id, FailureKind.OUT_OF_CAPACITY, "full"))
        (later,) = lifecycle.handle(events.NoWorker(JobId("a" * 32, attempt + 1)))
        assert isinstance(later, events.RetryLater)
        delays.append(later.delay_ms)
        (route,) = lifecycle.handle(events.RouteAgain())
        assert isinstance(route, events.Route)
        assert route.excluded_worker_ids == frozenset()
    assert delays == sorted(delays)
    assert delays[-1] == 1000
    lifecycle.handle(events.NoWorker(JobId("a" * 32, 12)))
    assert isinstance(finish_of(lifecycle.handle(events.GiveUpWaiting())).error, errors.OverloadedError)


def test_a_request_that_loses_every_attempt_fails_in_the_end() -> None:
    lifecycle = make_lifecycle(1, max_attempts=3)
    lifecycle.handle(events.Started())
    actions: list[events.Action] = []
    for attempt in range(1, 4):
        lifecycle.handle(events.Routed(JobId("a" * 32, attempt), f"d{attempt}", None))
        actions = lifecycle.handle(events.WorkerLost(f"d{attempt}"))
    assert isinstance(finish_of(actions).error, errors.UnavailableError)


def test_a_worker_that_knows_a_newer_attempt_gets_the_next_one() -> None:
    """A new owner counts attempts from the store, but the dead gateway may have come further."""
    lifecycle = make_lifecycle(1, attempt=2)
    lifecycle.handle(events.Started())
    lifecycle.handle(events.Routed(JobId("a" * 32, 2), "d1", None))
    *_, route = lifecycle.handle(events.JobFailed("d1", JobId("a" * 32, 2), FailureKind.SUPERSEDED, "known already"))
    assert isinstance(route, events.Route)
    assert route.job.job_id.attempt == 3
    assert route.excluded_worker_ids == frozenset()


def test_the_end_waits_a_moment_for_the_report_on_the_transfer() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.DecodeTokens("d1", (token(1, finish=FinishReason.LENGTH),)))
    (*_, timer) = lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    assert isinstance(timer, events.StartTimer)
    actions = lifecycle.handle(events.TransferDone("p1", FIRST, 64, 2.0, 1.0))
    assert finish_of(actions).state is RequestState.SUCCEEDED
    assert lifecycle.report.transfer_bytes == 64


def test_a_prefill_workers_failure_during_the_wait_for_its_report_ends_the_wait() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.DecodeTokens("d1", (token(1, finish=FinishReason.LENGTH),)))
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    actions = lifecycle.handle(events.JobFailed("p1", FIRST, FailureKind.TRANSFER, "late"))
    assert finish_of(actions).state is RequestState.SUCCEEDED


def test_a_prefill_workers_failure_changes_nothing_once_the_sequences_run() -> None:
    lifecycle = make_lifecycle(1)
    reserved(lifecycle)
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0),)))
    lifecycle.handle(events.DecodeStarted("d1", FIRST, 100))
    assert lifecycle.handle(events.JobFailed("p1", FIRST, FailureKind.TRANSFER, "acknowledgement lost")) == []


def test_a_stop_string_in_a_first_token_is_reported_once_the_sequences_run() -> None:
    lifecycle = make_lifecycle(2)
    reserved(lifecycle)
    lifecycle.handle(events.PrefillDone("p1", FIRST, (token(0, 0), token(0, 1))))
    assert lifecycle.handle(events.StopFound(1)) == []
    assert events.SendFinishSequence("d1", FIRST, 1) in lifecycle.handle(events.DecodeStarted("d1", FIRST, 100))


def test_a_job_that_a_stop_string_ended_is_cancelled_while_others_of_the_request_run() -> None:
    lifecycle = make_lifecycle(2)
    reserved(lifecycle, prefill=None)
    lifecycle.handle(events.DecodeTokens("d1", (token(0, 0), token(0, 1))))
    lifecycle.handle(events.WorkerLost("d1"))
    jobs = [JobId("a" * 32, 2, sequence) for sequence in range(2)]
    for job_id, worker_id in zip(jobs, ("d2", "d3"), strict=True):
        lifecycle.handle(events.Routed(job_id, worker_id, None))
        lifecycle.handle(events.Reserved(worker_id, job_id, b"", "", 0))
        lifecycle.handle(events.DecodeStarted(worker_id, job_id))
    assert lifecycle.handle(events.StopFound(1)) == [events.SendCancel("d3", jobs[1])]


@pytest.mark.parametrize("sequence", [1, 7, 2**32 - 1])
@pytest.mark.parametrize("from_prefill_worker", [True, False])
def test_a_token_of_a_sequence_that_the_request_does_not_have_costs_its_worker_the_attempt(
    sequence: int, from_prefill_worker: bool
) -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(events.Started())
    job_id = JobId("a" * 32, 1)
    lifecycle.handle(events.Routed(job_id, "d1", "p1" if from_prefill_worker else None))
    lifecycle.handle(events.Reserved("d1", job_id, b"t", "d1", 0))
    tokens = (SequenceToken(job_id, sequence, 0, Token(7)),)
    actions = lifecycle.handle(
        events.PrefillDone("p1", job_id, tokens) if from_prefill_worker else events.DecodeTokens("d1", tokens)
    )
    assert not any(isinstance(action, events.Emit) for action in actions)
    assert lifecycle.attempt == 2
    (route,) = (action for action in actions if isinstance(action, events.Route))
    assert route.excluded_worker_ids == {"p1" if from_prefill_worker else "d1"}
