"""Who is blamed for a worker's death, and who runs alone."""

from gateway import lifecycle_messages as m
from gateway.request_lifecycle import RequestLifecycle
from gateway.suspicion import Inquests, InStep
from kvrelay.errors import InternalError
from kvrelay.request_state import RequestState
from kvrelay.work import FailureKind, SequenceToken, Token, WorkId
from tests.gateway.lifecycle_simulation import make_lifecycle

REQUEST_ID = "a" * 32


def test_all_that_were_in_the_step_are_suspects() -> None:
    assert Inquests().open("d1", [InStep("a"), InStep("b")]) == {"a": m.Blame.SUSPECT, "b": m.Blame.SUSPECT}


def test_who_ran_alone_is_told_nothing_until_it_is_known_that_the_worker_is_dead_and_nobody_else_is_blamed() -> None:
    inquests = Inquests()
    assert inquests.open("d1", [InStep("a", ran_alone=True), InStep("b")]) == {"a": None, "b": m.Blame.NONE}
    assert inquests.close("d2") is None
    assert inquests.close("d1") == "a"
    assert inquests.close("d1") is None


def prompt_on(lifecycle: RequestLifecycle, prefill: str | None) -> None:
    """The current attempt's prompt is being computed, on d1 where there is no prefill worker."""
    work_id = WorkId(REQUEST_ID, lifecycle.attempt)
    lifecycle.handle(m.Routed(work_id, "d1", prefill))
    lifecycle.handle(m.Reserved("d1", work_id, b"t", "d1", 0))


def emit(lifecycle: RequestLifecycle, *indices: int) -> list[m.Action]:
    work_id = WorkId(REQUEST_ID, lifecycle.attempt)
    return lifecycle.handle(m.DecodeTokens("d1", tuple(SequenceToken(work_id, 0, index, Token(7)) for index in indices)))


def routes(actions: list[m.Action]) -> list[m.Route]:
    return [action for action in actions if isinstance(action, m.Route)]


def test_a_suspect_runs_alone_until_it_has_got_further() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    prompt_on(lifecycle, None)
    (route,) = routes(lifecycle.handle(m.WorkerLost("d1", m.Blame.SUSPECT)))
    assert route.work.runs_alone
    lifecycle.handle(m.Routed(WorkId(REQUEST_ID, 2), "d1", None))
    assert not lifecycle.runs_alone_on("d1"), "the worker may still compute something else"
    lifecycle.handle(m.Reserved("d1", WorkId(REQUEST_ID, 2), b"t", "d1", 0))
    emit(lifecycle, 0)
    assert lifecycle.runs_alone_on("d1"), "its prompt was computed, and no decode step yet"
    emit(lifecycle, 1)
    assert not lifecycle.runs_alone_on("d1")
    assert not lifecycle.suspected_worker_ids
    (route,) = routes(lifecycle.handle(m.WorkerLost("d1", m.Blame.NONE)))
    assert not route.work.runs_alone


def test_the_sequences_of_a_suspect_run_alone_one_after_the_other() -> None:
    lifecycle = make_lifecycle(2, emitted=((7,), (8,)))
    lifecycle.handle(m.Start())
    first, second = WorkId(REQUEST_ID, 1, 0), WorkId(REQUEST_ID, 1, 1)
    for work_id in (first, second):
        lifecycle.handle(m.Routed(work_id, "d1", None))
        lifecycle.handle(m.Reserved("d1", work_id, b"t", "d1", 0))
    (route,) = routes(lifecycle.handle(m.WorkerLost("d1", m.Blame.SUSPECT)))
    first, second = WorkId(REQUEST_ID, 2, 0), WorkId(REQUEST_ID, 2, 1)
    assert route.work.work_id == first
    lifecycle.handle(m.Routed(first, "d1", None))
    lifecycle.handle(m.Reserved("d1", first, b"t", "d1", 0))
    tokens = tuple(SequenceToken(first, 0, index, Token(7)) for index in (1, 2, 3))
    (route,) = routes(lifecycle.handle(m.DecodeTokens("d1", tokens)))
    assert route.work.work_id == second
    assert lifecycle.suspected_worker_ids
    lifecycle.handle(m.Routed(second, "d1", None))
    lifecycle.handle(m.Reserved("d1", second, b"t", "d1", 0))
    assert lifecycle.runs_alone_on("d1")
    lifecycle.handle(m.DecodeTokens("d1", tuple(SequenceToken(second, 1, index, Token(7)) for index in (1, 2))))
    assert not lifecycle.suspected_worker_ids


def test_a_suspect_is_not_paused_while_others_wait_for_it() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    prompt_on(lifecycle, None)
    lifecycle.handle(m.WorkerLost("d1", m.Blame.SUSPECT))
    prompt_on(lifecycle, None)
    emit(lifecycle, 0)
    assert lifecycle.handle(m.ReadersBehind(True)) == []
    assert m.SendSetPaused("d1", WorkId(REQUEST_ID, 2), True) in emit(lifecycle, 1)


def test_a_request_that_is_cleared_runs_with_the_others_again() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    prompt_on(lifecycle, None)
    lifecycle.handle(m.WorkerLost("d1", m.Blame.SUSPECT))
    lifecycle.handle(m.Cleared("d1"))
    prompt_on(lifecycle, None)
    (route,) = routes(lifecycle.handle(m.WorkerLost("d1", m.Blame.NONE)))
    assert not route.work.runs_alone


def test_a_guilty_request_ends_with_internal_and_says_why() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    prompt_on(lifecycle, "p1")
    lifecycle.handle(m.WorkerLost("p1", m.Blame.SUSPECT))
    prompt_on(lifecycle, "p2")
    finish = lifecycle.handle(m.WorkerLost("p2", m.Blame.GUILTY))[-1]
    assert isinstance(finish, m.Finish)
    assert finish.state is RequestState.FAILED
    assert isinstance(finish.error, InternalError)
    assert "quarantined" in finish.error.message


def test_an_innocent_request_survives_as_many_deaths_as_it_gets_further_between() -> None:
    lifecycle = make_lifecycle(1, max_attempts=3)
    lifecycle.handle(m.Start())
    for number in range(20):
        prompt_on(lifecycle, None)
        emit(lifecycle, 2 * number, 2 * number + 1)
        lifecycle.handle(m.WorkerLost("d1", m.Blame.SUSPECT))
    assert not lifecycle.finished
    assert lifecycle.attempt == 21


def test_only_who_may_be_in_the_step_is_asked_about() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    work_id = WorkId(REQUEST_ID, 1)
    lifecycle.handle(m.Routed(work_id, "d1", "p1"))
    assert not lifecycle.may_be_in_step_of("d1"), "reserved only"
    lifecycle.handle(m.Reserved("d1", work_id, b"t", "d1", 0))
    assert lifecycle.may_be_in_step_of("p1")
    assert not lifecycle.may_be_in_step_of("d1"), "its KV is not there"
    lifecycle.handle(m.PrefillDone("p1", work_id, (SequenceToken(work_id, 0, 0, Token(7)),)))
    assert not lifecycle.may_be_in_step_of("p1"), "it only sends"
    assert lifecycle.may_be_in_step_of("d1"), "its KV may be there, and the step may have begun"


def test_a_push_that_breaks_because_its_worker_dies_does_not_hide_who_was_in_the_step() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    prompt_on(lifecycle, "p1")
    (timer,) = lifecycle.handle(m.WorkFailed("d1", WorkId(REQUEST_ID, 1), FailureKind.TRANSFER, "the push broke off"))
    assert isinstance(timer, m.StartTimer)
    assert lifecycle.may_be_in_step_of("p1"), "whose end is heard of later"
    (route,) = routes(lifecycle.handle(m.WorkerLost("p1", m.Blame.SUSPECT)))
    assert route.work.runs_alone
    assert lifecycle.attempt == 2


def test_a_push_that_broke_is_tried_again_by_what_the_other_side_says_or_soon() -> None:
    for event in (
        m.WorkFailed("p1", WorkId(REQUEST_ID, 1), FailureKind.TRANSFER, "the push was broken off"),
        m.TimerFired(1),
    ):
        lifecycle = make_lifecycle(1)
        lifecycle.handle(m.Start())
        prompt_on(lifecycle, "p1")
        lifecycle.handle(m.WorkFailed("d1", WorkId(REQUEST_ID, 1), FailureKind.TRANSFER, "the push broke off"))
        assert any(isinstance(action, m.Route) for action in lifecycle.handle(event))
        assert lifecycle.attempt == 2
