"""Bounds on what the gateway takes on."""

import pytest

from gateway.admission import LONGEST_RETRY_MS, SHORTEST_RETRY_MS, Admission
from kvrelay.errors import OverloadedError


def test_requests_beyond_the_bound_are_refused_until_one_ends() -> None:
    admission = Admission(max_running_requests=2, max_queued_prompt_tokens=1000)
    first = admission.admit(10, now=0.0)
    admission.admit(10, now=0.0)
    with pytest.raises(OverloadedError) as refused:
        admission.admit(10, now=0.0)
    with pytest.raises(OverloadedError):
        admission.check_room()
    assert SHORTEST_RETRY_MS <= refused.value.retry_after_ms <= LONGEST_RETRY_MS
    first.release(now=1.0)
    first.release(now=1.0)
    assert admission.num_running_requests == 1
    admission.check_room()
    admission.admit(10, now=1.0)


def test_prompt_tokens_count_until_the_first_token() -> None:
    admission = Admission(max_running_requests=10, max_queued_prompt_tokens=100)
    first = admission.admit(90, now=0.0)
    with pytest.raises(OverloadedError):
        admission.admit(11, now=0.0)
    first.note_first_token(now=0.5)
    first.note_first_token(now=0.6)
    assert admission.num_queued_prompt_tokens == 0
    admission.admit(11, now=1.0).release(now=2.0)
    first.release(now=3.0)
    assert (admission.num_running_requests, admission.num_queued_prompt_tokens) == (0, 0)


def test_a_prompt_larger_than_the_bound_is_admitted_alone() -> None:
    admission = Admission(max_running_requests=10, max_queued_prompt_tokens=100)
    admission.admit(500, now=0.0)
    with pytest.raises(OverloadedError):
        admission.admit(1, now=0.0)
