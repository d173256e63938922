"""What a gateway counts before anything happened, and how requests that went wrong are counted."""

from gateway import metrics
from gateway.metrics import GatewayMetrics
from kvrelay.errors import DeadlineError, InternalError, OverloadedError, StoreFullError
from kvrelay.metrics.families import Family
from kvrelay.request_state import RequestState


def counts(counted: GatewayMetrics, family: Family) -> dict[tuple[str, ...], object]:
    """A family's values by its labels."""
    return {sample.labels: sample.value for sample in counted.samples() if sample.family is family}


def test_what_may_go_wrong_is_shown_as_zero_before_it_does() -> None:
    """A rate sees no first refusal of a series that begins with it."""
    counted = GatewayMetrics()
    counted.of_model("llama")
    refusals, failures = counts(counted, metrics.REFUSALS), counts(counted, metrics.FAILURES)
    assert {("OVERLOADED",), ("STATE_STORE_FULL",), ("UNAVAILABLE",)} == refusals.keys()
    assert {("llama", "INTERNAL"), ("llama", "UNAVAILABLE")} <= failures.keys()
    assert {*refusals.values(), *failures.values(), *counts(counted, metrics.ATTEMPTS).values()} == {0}


def test_refusals_and_failures_are_counted_by_their_reasons() -> None:
    counted = GatewayMetrics()
    for error in (OverloadedError("full"), OverloadedError("full"), StoreFullError("full")):
        counted.note_refused(error)
    model = counted.of_model("llama")
    model.note_ended(RequestState.FAILED, InternalError("defect"), 1.0, released=False)
    model.note_ended(RequestState.EXPIRED, DeadlineError("late"), 1.0, released=False)
    model.note_ended(RequestState.FAILED, InternalError("elsewhere"), 1.0, released=True)
    refusals = counts(counted, metrics.REFUSALS)
    assert (refusals["OVERLOADED",], refusals["STATE_STORE_FULL",]) == (2, 1)
    assert sum(value for value in counts(counted, metrics.FAILURES).values() if isinstance(value, int)) == 1
    outcomes = counts(counted, metrics.REQUESTS)
    assert [outcomes["llama", name] for name in ("failed", "expired", "left")] == [1, 1, 1]
