"""Who is blamed for a worker's death, and who runs apart."""

from gateway import lifecycle_messages as m
from gateway.request_lifecycle import RequestLifecycle
from gateway.suspicion import InStep, Trials, blame_for_death
from kvrelay.errors import InternalError
from kvrelay.request_state import RequestState
from kvrelay.work import FailureKind, SequenceToken, Token, WorkId
from tests.gateway.lifecycle_simulation import make_lifecycle

REQUEST_ID = "a" * 32


def test_all_that_were_in_the_step_are_suspects_of_a_first_death() -> None:
    assert blame_for_death([InStep("a"), InStep("b")]) == {"a": m.Blame.SUSPECT, "b": m.Blame.SUSPECT}


def test_the_only_suspect_of_a_second_death_is_guilty_and_nobody_else_is_blamed() -> None:
    assert blame_for_death([InStep("a", 1), InStep("b")]) == {"a": m.Blame.GUILTY, "b": m.Blame.NONE}


def test_of_two_suspects_neither_is_guilty() -> None:
    assert blame_for_death([InStep("a", 1), InStep("b", 1)]) == {"a": m.Blame.SUSPECT, "b": m.Blame.SUSPECT}


def test_where_another_gateways_suspect_may_have_been_too_one_death_more_has_to_say_the_same() -> None:
    assert blame_for_death([InStep("a", 1, had_worker_alone=False)]) == {"a": m.Blame.SUSPECT}
    assert blame_for_death([InStep("a", 2, had_worker_alone=False)]) == {"a": m.Blame.GUILTY}


def test_suspects_do_not_share_workers() -> None:
    trials = Trials("g1")
    trials.begin("a", ("d1", None))
    trials.begin("b", ("d2", "p1"))
    assert trials.workers_of_others("c") == {"d1", "d2", "p1"}
    assert trials.workers_of_others("a") == {"d2", "p1"}
    assert trials.end("b")
    assert not trials.end("b")
    assert trials.workers_of_others("c") == {"d1"}


def test_every_worker_is_tried_on_by_one_gateway_whichever_others_come_and_go() -> None:
    gateways = {name: Trials(name) for name in ("g1", "g2", "g3")}
    for trials in gateways.values():
        trials.set_gateways(gateways)
    workers = [f"d{number}" for number in range(60)]
    owners = {worker: [name for name, trials in gateways.items() if trials.is_own(worker)] for worker in workers}
    assert all(len(names) == 1 for names in owners.values())
    assert {names[0] for names in owners.values()} == set(gateways)
    for name in ("g1", "g2"):
        gateways[name].set_gateways(("g1", "g2"))
    assert all(gateways[names[0]].is_own(worker) for worker, names in owners.items() if names != ["g3"])
    assert all(Trials("alone").is_own(worker) for worker in workers)


def prompt_on(lifecycle: RequestLifecycle, prefill: str | None) -> None:
    """The current attempt's prompt is being computed, on d1 where there is no prefill worker."""
    work_id = WorkId(REQUEST_ID, lifecycle.attempt)
    lifecycle.handle(m.Routed(work_id, "d1", prefill))
    lifecycle.handle(m.Reserved("d1", work_id, b"t", "d1", 0))


def emit(lifecycle: RequestLifecycle, *indices: int) -> list[m.Action]:
    work_id = WorkId(REQUEST_ID, lifecycle.attempt)
    return lifecycle.handle(m.DecodeTokens("d1", tuple(SequenceToken(work_id, 0, index, Token(7)) for index in indices)))


def test_a_suspect_is_routed_apart_until_it_has_got_further() -> None:
    lifecycle = make_lifecycle(1)
    lifecycle.handle(m.Start())
    prompt_on(lifecycle, None)
    (route,) = (a for a in lifecycle.handle(m.WorkerLost("d1", m.Blame.SUSPECT)) if isinstance(a, m.Route))
    assert route.apart
    prompt_on(lifecycle, None)
    assert m.EndTrial() not in emit(lifecycle, 0)
    assert lifecycle.is_suspect, "its prompt was computed, and no decode step yet"
    assert m.EndTrial() in emit(lifecycle, 1)
    assert not lifecycle.is_suspect
    (route,) = (a for a in lifecycle.handle(m.WorkerLost("d1", m.Blame.NONE)) if isinstance(a, m.Route))
    assert not route.apart


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
    (route,) = (a for a in lifecycle.handle(m.WorkerLost("p1", m.Blame.SUSPECT)) if isinstance(a, m.Route))
    assert route.apart
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
