"""What a gateway counts before anything happened, and how requests that went wrong are counted."""

from types import SimpleNamespace
from typing import Any

import pytest

from gateway import metrics
from gateway.metrics import GatewayMetrics
from gateway.prompt_preparation import check_response_format
from kvrelay.errors import DeadlineError, InternalError, InvalidRequestError, KvrelayError, OverloadedError, StoreFullError
from kvrelay.metrics.families import Family
from kvrelay.request_state import RequestState
from kvrelay.response_format import FormatKind, ResponseFormat
from kvrelay.sampling_params import SamplingParams


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
    for error in (OverloadedError("full"), OverloadedError("full"), StoreFullError("full"), InvalidRequestError("x", "is wrong")):
        with pytest.raises(KvrelayError), counted.noting_refusals():
            raise error
    model = counted.of_model("llama")
    model.note_ended(RequestState.FAILED, InternalError("defect"), 1.0, released=False)
    model.note_ended(RequestState.EXPIRED, DeadlineError("late"), 1.0, released=False)
    model.note_ended(RequestState.FAILED, InternalError("elsewhere"), 1.0, released=True)
    refusals = counts(counted, metrics.REFUSALS)
    assert refusals == {("OVERLOADED",): 2, ("STATE_STORE_FULL",): 1, ("UNAVAILABLE",): 0}
    assert sum(value for value in counts(counted, metrics.FAILURES).values() if isinstance(value, int)) == 1
    outcomes = counts(counted, metrics.REQUESTS)
    assert [outcomes["llama", name] for name in ("failed", "expired", "left")] == [1, 1, 1]


async def test_a_request_whose_form_finds_no_room_is_counted_as_refused() -> None:
    async def refuse(form: ResponseFormat) -> None:
        raise OverloadedError("too many forms")

    counted = GatewayMetrics()
    relay: Any = SimpleNamespace(metrics=counted, forms=SimpleNamespace(get=refuse))
    limits: Any = SimpleNamespace(model=SimpleNamespace(eos_token_ids=(0,)))
    sampling = SamplingParams(response_format=ResponseFormat(FormatKind.REGEX, "a+"))
    with pytest.raises(OverloadedError):
        await check_response_format(sampling, relay, limits)
    assert counts(counted, metrics.REFUSALS)["OVERLOADED",] == 1
