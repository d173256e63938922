"""Counters before anything happened, and counts of failed requests."""

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.requests.response_formats import ResponseFormats
from gateway.telemetry import metrics
from gateway.telemetry.metrics import GatewayMetrics
from kvrelay.core.request_state import RequestState
from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    KvrelayError,
    OverloadedError,
    StoreFullError,
)
from kvrelay.observability.metrics.families import Family


def counts(counted: GatewayMetrics, family: Family) -> dict[tuple[str, ...], object]:
    """A family's values by its labels."""
    return {sample.labels: sample.value for sample in counted.samples() if sample.family is family}


def test_failure_counters_start_at_zero() -> None:
    """A rate does not see the first failure of a series that begins with it."""
    counted = GatewayMetrics()
    counted.of_model("llama")
    refusals, failures = counts(counted, metrics.REFUSALS), counts(counted, metrics.FAILURES)
    assert {("OVERLOADED",), ("QUOTA_EXCEEDED",), ("STATE_STORE_FULL",), ("UNAVAILABLE",)} == refusals.keys()
    assert {("llama", "INTERNAL"), ("llama", "UNAVAILABLE")} <= failures.keys()
    assert {*refusals.values(), *failures.values(), *counts(counted, metrics.ATTEMPTS).values()} == {0}


def test_refusals_and_failures_are_counted_by_their_reasons() -> None:
    counted = GatewayMetrics()
    for error in (
        OverloadedError("full"),
        OverloadedError("full"),
        StoreFullError("full"),
        InvalidRequestError("x", "is wrong"),
    ):
        with pytest.raises(KvrelayError), counted.counting_refusals():
            raise error
    model = counted.of_model("llama")
    model.record_end(RequestState.FAILED, InternalError("defect"), 1.0, released=False)
    model.record_end(RequestState.EXPIRED, DeadlineError("late"), 1.0, released=False)
    model.record_end(RequestState.FAILED, InternalError("elsewhere"), 1.0, released=True)
    refusals = counts(counted, metrics.REFUSALS)
    assert refusals == {("OVERLOADED",): 2, ("QUOTA_EXCEEDED",): 0, ("STATE_STORE_FULL",): 1, ("UNAVAILABLE",): 0}
    assert sum(value for value in counts(counted, metrics.FAILURES).values() if isinstance(value, int)) == 1
    outcomes = counts(counted, metrics.REQUESTS)
    assert [outcomes["llama", name] for name in ("failed", "expired", "left")] == [1, 1, 1]


async def test_a_request_whose_response_format_is_refused_for_load_counts_as_refused() -> None:
    class FullChecks:
        def __contains__(self, response_format: ResponseFormat) -> bool:
            return False

        async def check(self, response_format: ResponseFormat) -> None:
            raise OverloadedError("too many response formats")

    counted = GatewayMetrics()
    full: Any = FullChecks()
    limits: Any = SimpleNamespace(model=SimpleNamespace(eos_token_ids=(0,)))
    sampling = SamplingParams(response_format=ResponseFormat(FormatKind.REGEX, "a+"))
    with pytest.raises(OverloadedError):
        await ResponseFormats(full, counted).check(sampling, limits)
    assert counts(counted, metrics.REFUSALS)["OVERLOADED",] == 1
