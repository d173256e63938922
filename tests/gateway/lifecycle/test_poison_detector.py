"""Which requests are suspected of a worker's death, and which run isolated."""

from gateway.lifecycle import events
from gateway.lifecycle.events import CrashVerdict
from gateway.lifecycle.lifecycle import RequestLifecycle
from gateway.lifecycle.poison_detector import InStep, PoisonDetector
from kvrelay.core.job import FailureKind, JobId, SequenceToken, Token
from kvrelay.core.request_state import RequestState
from kvrelay.errors import InternalError
from tests.support.lifecycle_simulation import make_lifecycle

REQUEST_ID = "a" * 32


def test_all_requests_in_the_step_are_suspected() -> None:
    assert PoisonDetector().on_death_suspected("d1", [InStep("a"), InStep("b")]) == {
        "a": CrashVerdict.SUSPECTED,
        "b": CrashVerdict.SUSPECTED,
    }


def test_the_verdict_on_an_isolated_request_waits_for_the_confirmed_death() -> None:
    detector = PoisonDetector()
    assert detector.on_death_suspected("d1", [InStep("a", was_isolated=True), InStep("b")]) == {
        "a": None,
        "b": CrashVerdict.NONE,
    }
    assert detector.on_death_resolved("d2") is None
    assert detector.on_death_resolved("d1") == "a"
    assert detector.on_death_resolved("d1") is None


def prompt_on(lifecycle: RequestLifecycle, prefill: str | None) -> None:
    """The current attempt's prompt runs; on d1 if there is no prefill worker."""
    job_id = JobId(REQUEST_ID, lifecycle.attempt)
    lifecycle.handle(events.Routed(job_id, "d1", prefill))
    lifecycle.handle(events.Reserved("d1", job_id, b"t", "d1", 0))


def emit(lifecycle: RequestLifecycle, *indices: int) -> list[events.Action]:
    job_id = JobId(REQUEST_ID, lifecycle.attempt)
    return lifecycle.handle(
        events.DecodeTokens("d1", tuple(SequenceToken(job_id, 0, index, Token(7)) for index in indices))
    )


def routes(actions: list[events.Action]) -> list[events.Route]:
    return [action for action in actions if isinstance(action, events.Route)]


def test_a_suspected_request_is_isolated_until_it_progresses() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(events.Started())
    prompt_on(lifecycle, None)
    (route,) = routes(lifecycle.handle(events.WorkerLost("d1", CrashVerdict.SUSPECTED)))
    assert route.job.isolated
    lifecycle.handle(events.Routed(JobId(REQUEST_ID, 2), "d1", None))
    assert not lifecycle.is_isolated_on("d1"), "the worker may still compute something else"
    lifecycle.handle(events.Reserved("d1", JobId(REQUEST_ID, 2), b"t", "d1", 0))
    emit(lifecycle, 0)
    assert lifecycle.is_isolated_on("d1"), "its prompt was computed, and no decode step yet"
    emit(lifecycle, 1)
    assert not lifecycle.is_isolated_on("d1")
    assert not lifecycle.suspected_worker_ids
    (route,) = routes(lifecycle.handle(events.WorkerLost("d1", CrashVerdict.NONE)))
    assert not route.job.isolated


def test_sequences_of_a_suspected_request_are_isolated_one_by_one() -> None:
    lifecycle = make_lifecycle(2, emitted=((7,), (8,)))
    lifecycle.handle(events.Started())
    first, second = JobId(REQUEST_ID, 1, 0), JobId(REQUEST_ID, 1, 1)
    for job_id in (first, second):
        lifecycle.handle(events.Routed(job_id, "d1", None))
        lifecycle.handle(events.Reserved("d1", job_id, b"t", "d1", 0))
    (route,) = routes(lifecycle.handle(events.WorkerLost("d1", CrashVerdict.SUSPECTED)))
    first, second = JobId(REQUEST_ID, 2, 0), JobId(REQUEST_ID, 2, 1)
    assert route.job.job_id == first
    lifecycle.handle(events.Routed(first, "d1", None))
    lifecycle.handle(events.Reserved("d1", first, b"t", "d1", 0))
    tokens = tuple(SequenceToken(first, 0, index, Token(7)) for index in (1, 2, 3))
    (route,) = routes(lifecycle.handle(events.DecodeTokens("d1", tokens)))
    assert route.job.job_id == second
    assert lifecycle.suspected_worker_ids
    lifecycle.handle(events.Routed(second, "d1", None))
    lifecycle.handle(events.Reserved("d1", second, b"t", "d1", 0))
    assert lifecycle.is_isolated_on("d1")
    lifecycle.handle(events.DecodeTokens("d1", tuple(SequenceToken(second, 1, index, Token(7)) for index in (1, 2))))
    assert not lifecycle.suspected_worker_ids


def test_an_isolated_request_is_not_paused() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(events.Started())
    prompt_on(lifecycle, None)
    lifecycle.handle(events.WorkerLost("d1", CrashVerdict.SUSPECTED))
    prompt_on(lifecycle, None)
    emit(lifecycle, 0)
    assert lifecycle.handle(events.ReadersBehind(True)) == []
    assert events.SendSetPaused("d1", JobId(REQUEST_ID, 2), True) in emit(lifecycle, 1)


def test_a_cleared_request_runs_in_the_batch_again() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(events.Started())
    prompt_on(lifecycle, None)
    lifecycle.handle(events.WorkerLost("d1", CrashVerdict.SUSPECTED))
    lifecycle.handle(events.SuspicionCleared("d1"))
    prompt_on(lifecycle, None)
    (route,) = routes(lifecycle.handle(events.WorkerLost("d1", CrashVerdict.NONE)))
    assert not route.job.isolated


def test_a_confirmed_poison_request_ends_with_internal_and_says_why() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(events.Started())
    prompt_on(lifecycle, "p1")
    lifecycle.handle(events.WorkerLost("p1", CrashVerdict.SUSPECTED))
    prompt_on(lifecycle, "p2")
    finish = lifecycle.handle(events.WorkerLost("p2", CrashVerdict.CONFIRMED))[-1]
    assert isinstance(finish, events.Finish)
    assert finish.state is RequestState.FAILED
    assert isinstance(finish.error, InternalError)
    assert "quarantined" in finish.error.message


def test_a_request_that_progresses_between_deaths_survives_them() -> None:
    lifecycle = make_lifecycle(1, max_attempts=3)
    lifecycle.handle(events.Started())
    for number in range(20):
        prompt_on(lifecycle, None)
        emit(lifecycle, 2 * number, 2 * number + 1)
        lifecycle.handle(events.WorkerLost("d1", CrashVerdict.SUSPECTED))
    assert not lifecycle.finished
    assert lifecycle.attempt == 21


def test_only_requests_that_may_be_in_the_step_are_suspected() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(events.Started())
    job_id = JobId(REQUEST_ID, 1)
    lifecycle.handle(events.Routed(job_id, "d1", "p1"))
    assert not lifecycle.may_be_in_step_of("d1"), "reserved only"
    lifecycle.handle(events.Reserved("d1", job_id, b"t", "d1", 0))
    assert lifecycle.may_be_in_step_of("p1")
    assert not lifecycle.may_be_in_step_of("d1"), "its KV is not there"
    lifecycle.handle(events.PrefillDone("p1", job_id, (SequenceToken(job_id, 0, 0, Token(7)),)))
    assert not lifecycle.may_be_in_step_of("p1"), "it only sends"
    assert lifecycle.may_be_in_step_of("d1"), "its KV may be there, and the step may have begun"


def test_a_push_broken_by_a_death_does_not_hide_the_requests_in_the_step() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(events.Started())
    prompt_on(lifecycle, "p1")
    (timer,) = lifecycle.handle(
        events.JobFailed("d1", JobId(REQUEST_ID, 1), FailureKind.TRANSFER, "the push broke off")
    )
    assert isinstance(timer, events.StartTimer)
    assert lifecycle.may_be_in_step_of("p1"), "whose end is heard of later"
    (route,) = routes(lifecycle.handle(events.WorkerLost("p1", CrashVerdict.SUSPECTED)))
    assert route.job.isolated
    assert lifecycle.attempt == 2


def test_a_broken_push_is_retried_after_news_of_the_peer_or_a_timeout() -> None:
    for event in (
        events.JobFailed("p1", JobId(REQUEST_ID, 1), FailureKind.TRANSFER, "the push was broken off"),
        events.TimerFired(1),
    ):
        lifecycle = make_lifecycle(1)
        lifecycle.handle(events.Started())
        prompt_on(lifecycle, "p1")
        lifecycle.handle(events.JobFailed("d1", JobId(REQUEST_ID, 1), FailureKind.TRANSFER, "the push broke off"))
        assert any(isinstance(action, events.Route) for action in lifecycle.handle(event))
        assert lifecycle.attempt == 2
