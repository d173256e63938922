"""The end of a request as another gateway reads it from the store."""

from dataclasses import replace

import pytest

from gateway.resume.stored_output import error_of_record
from kvrelay.core.request_state import RequestState
from kvrelay.errors import (
    CancelledRequestError,
    DeadlineError,
    KvrelayError,
    OverloadedError,
    StoreFullError,
    UnreadableStateError,
)
from tests.support.redis_fixtures import make_record


@pytest.mark.parametrize("kind", [OverloadedError, StoreFullError, DeadlineError])
def test_a_stored_error_is_read_back_unchanged(kind: type[KvrelayError]) -> None:
    record = replace(make_record(), state=RequestState.FAILED, error_reason=kind.reason, error_message="as it was")
    error = error_of_record(record)
    assert type(error) is kind
    assert error.message == "as it was"


@pytest.mark.parametrize("reason", ["", "A_REASON_OF_A_LATER_VERSION", "\0", "x" * 10_000])
@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (RequestState.CANCELLED, CancelledRequestError),
        (RequestState.EXPIRED, DeadlineError),
        (RequestState.FAILED, UnreadableStateError),
    ],
)
def test_an_unknown_stored_reason_becomes_the_error_of_its_state(
    state: RequestState, kind: type[KvrelayError], reason: str
) -> None:
    assert type(error_of_record(replace(make_record(), state=state, error_reason=reason, error_message="?"))) is kind
