"""Bounds on admitted requests, of all and of each key."""

from collections.abc import Callable

import pytest

from gateway.requests import admission as admission_module
from gateway.requests.admission import LONGEST_RETRY_MS, SHORTEST_RETRY_MS, Admission, Admitted, Bounds
from gateway.requests.key_limits import Caller
from gateway.requests.place_queue import Waiting
from kvrelay.core.limit_names import LimitName
from kvrelay.errors import OverloadedError, QuotaError
from kvrelay.security.principal import Limits

LOCAL_CALLER = Caller()


def admit(admission: Admission, num_tokens: int = 10, caller: Caller = LOCAL_CALLER, now: float = 0.0) -> Admitted:
    place = admission.take_place(caller, now)
    try:
        place.admit_prompt(num_tokens)
    except OverloadedError:
        place.release(now)
        raise
    return place


def key(name: str, weight: int = 1, **limits: int) -> Caller:
    return Caller(name, name, Limits(weight=weight, **limits), waits=True)


def refused_by(limit: LimitName, key_id: str, attempt: Callable[[], object]) -> QuotaError:
    with pytest.raises(QuotaError) as refused:
        attempt()
    assert refused.value.limit == limit
    assert key_id in refused.value.message
    assert refused.value.retry_after_ms > 0
    return refused.value


# --- of the gateway


def test_requests_beyond_the_bound_are_refused_until_one_ends() -> None:
    admission = Admission(Bounds(2, 1000))
    first = admit(admission)
    admit(admission)
    with pytest.raises(OverloadedError) as refused:
        admit(admission)
    with pytest.raises(OverloadedError):
        admission.check_room(LOCAL_CALLER, 0.0)
    assert SHORTEST_RETRY_MS <= refused.value.retry_after_ms <= LONGEST_RETRY_MS
    first.release(now=1.0)
    first.release(now=1.0)
    assert admission.num_running_requests == 1
    admission.check_room(LOCAL_CALLER, 1.0)
    admit(admission)


def test_prompt_tokens_count_until_the_first_token() -> None:
    admission = Admission(Bounds(10, 100))
    first = admit(admission, 90)
    with pytest.raises(OverloadedError):
        admit(admission, 11)
    first.on_first_token(now=0.5)
    first.on_first_token(now=0.6)
    assert admission.num_queued_prompt_tokens == 0
    admit(admission, 11).release(now=2.0)
    first.release(now=3.0)
    assert (admission.num_running_requests, admission.num_queued_prompt_tokens) == (0, 0)


def test_a_prompt_larger_than_the_bound_is_admitted_alone() -> None:
    admission = Admission(Bounds(10, 100))
    admit(admission, 500)
    with pytest.raises(OverloadedError):
        admit(admission, 1)


def test_prompts_of_one_key_do_not_keep_small_prompts_of_another_out() -> None:
    admission = Admission(Bounds(10, 100))
    admit(admission, 95, key("greedy"))
    admit(admission, 50, key("small"))
    with pytest.raises(OverloadedError):
        admit(admission, 1, key("small"))  # it has its half already
    with pytest.raises(OverloadedError):
        admit(admission, 60, key("late"))
    assert admission.num_queued_prompt_tokens <= 200


# --- of a key


def test_a_key_runs_no_more_requests_than_it_may_and_others_are_served() -> None:
    admission = Admission(Bounds(10, 1000))
    greedy = key("greedy", running_requests=5)
    places = [admit(admission, caller=greedy) for _ in range(5)]
    refused_by(LimitName.RUNNING_REQUESTS, "greedy", lambda: admit(admission, caller=greedy))
    admit(admission, caller=key("small", running_requests=5))
    places[0].release(now=1.0)
    admit(admission, caller=greedy)


def test_a_key_queues_no_more_prompt_tokens_than_it_may() -> None:
    admission = Admission(Bounds(10, 1000))
    greedy = key("greedy", queued_prompt_tokens=100)
    first = admit(admission, 500, greedy)  # alone, as in a gateway
    refused_by(LimitName.QUEUED_PROMPT_TOKENS, "greedy", lambda: admit(admission, 1, greedy))
    admit(admission, 1, key("small", queued_prompt_tokens=100))
    first.on_first_token(now=1.0)
    admit(admission, 100, greedy)


def test_a_key_over_its_output_tokens_starts_nothing_until_they_are_refilled() -> None:
    admission = Admission(Bounds(10, 1000))
    caller = key("greedy", output_tokens_per_minute=60)
    running = admit(admission, caller=caller)
    for _ in range(90):
        running.count_output_token()
    error = refused_by(LimitName.OUTPUT_TOKENS, "greedy", lambda: admit(admission, caller=caller, now=0.0))
    assert error.retry_after_ms == 31_000, "30 tokens of debt, and one to take"
    running.count_output_token()  # it goes on
    refused_by(LimitName.OUTPUT_TOKENS, "greedy", lambda: admit(admission, caller=caller, now=31.0))
    admit(admission, caller=caller, now=32.0)


def test_a_key_has_no_more_response_formats_compiled_than_it_may() -> None:
    admission = Admission(Bounds(10, 1000))
    caller = key("greedy", formats_per_minute=2)
    admission.take_format(caller, 0.0)
    admission.take_format(caller, 0.0)
    refused_by(LimitName.FORMATS, "greedy", lambda: admission.take_format(caller, 0.0))
    admission.take_format(key("small", formats_per_minute=2), 0.0)
    admission.take_format(caller, 30.0)


def test_a_keys_bytes_count_until_redis_has_dropped_them() -> None:
    admission = Admission(Bounds(10, 1000, retention_s=100.0))
    caller = key("greedy", stored_bytes=1000)
    place = admit(admission, caller=caller)
    place.set_stored_bytes(400)
    place.set_stored_bytes(1000)
    refused_by(LimitName.STORED_BYTES, "greedy", lambda: admit(admission, caller=caller, now=5.0))
    place.release(now=10.0)
    error = refused_by(LimitName.STORED_BYTES, "greedy", lambda: admit(admission, caller=caller, now=70.0))
    assert error.retry_after_ms == 40_000
    admit(admission, caller=caller, now=110.0)


def test_what_redis_drops_at_a_requests_end_counts_no_longer() -> None:
    admission = Admission(Bounds(10, 1000, retention_s=100.0))
    caller = key("greedy", stored_bytes=1000)
    place = admit(admission, caller=caller)
    place.set_stored_bytes(1000)
    place.set_stored_bytes(100)
    place.release(now=10.0)
    admit(admission, caller=caller, now=11.0)


def test_a_key_leaves_no_more_requests_without_a_client_than_it_may() -> None:
    admission = Admission(Bounds(10, 1000))
    caller = key("greedy", unattended_requests=1)
    first, second = admit(admission, caller=caller), admit(admission, caller=caller)
    first.set_unattended(True)
    first.set_unattended(True)
    refused_by(LimitName.UNATTENDED_REQUESTS, "greedy", lambda: second.set_unattended(True))
    first.set_unattended(False)
    second.set_unattended(True)
    second.release(now=1.0)
    first.set_unattended(True)


def test_a_key_without_any_output_tokens_or_formats_gets_none() -> None:
    admission = Admission(Bounds(10, 1000))
    caller = key("frozen", output_tokens_per_minute=0, formats_per_minute=0)
    refused_by(LimitName.OUTPUT_TOKENS, "frozen", lambda: admit(admission, caller=caller))
    refused_by(LimitName.FORMATS, "frozen", lambda: admission.take_format(caller, 1000.0))


def test_changed_limits_of_a_key_count_from_the_next_request() -> None:
    admission = Admission(Bounds(10, 1000))
    admit(admission, caller=key("one", running_requests=1))
    refused_by(LimitName.RUNNING_REQUESTS, "one", lambda: admit(admission, caller=key("one", running_requests=1)))
    admit(admission, caller=key("one", running_requests=2))


def test_a_changed_limit_forgives_no_debt() -> None:
    admission = Admission(Bounds(10, 1000))
    running = admit(admission, caller=key("one", output_tokens_per_minute=10))
    for _ in range(20):
        running.count_output_token()
    changed = key("one", output_tokens_per_minute=11)
    refused_by(LimitName.OUTPUT_TOKENS, "one", lambda: admit(admission, caller=changed))


def test_keys_that_are_at_rest_are_forgotten_and_others_keep_what_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MAX_KEYS_KEPT", 3)
    admission = Admission(Bounds(100, 1000))
    busy = key("busy", running_requests=1)
    admit(admission, caller=busy)
    for number in range(50):
        admit(admission, caller=key(f"k{number}")).release(now=1.0)
    assert len(admission._keys) <= 4
    refused_by(LimitName.RUNNING_REQUESTS, "busy", lambda: admit(admission, caller=busy))


# --- waiting for a place


class Waiters:
    def __init__(self, num_places: int, max_waiting: int = 100) -> None:
        self.admission = Admission(Bounds(num_places, 10**6, max_waiting))
        self.woken: list[str] = []

    def wait(self, caller: Caller) -> Waiting:
        return self.admission.wait_for_place(caller, 0.0, lambda: self.woken.append(caller.key_id))


def test_freed_places_go_to_tenants_in_turn_whoever_came_first() -> None:
    waiters = Waiters(num_places=2)
    running = [admit(waiters.admission, caller=key("greedy")) for _ in range(2)]
    waiting = [waiters.wait(key("greedy")) for _ in range(3)] + [waiters.wait(key("a")), waiters.wait(key("b"))]
    for _ in range(5):
        running.pop(0).release(now=1.0)
        placed = next(each for each in waiting if each.has_place)
        waiting.remove(placed)
        running.append(waiters.admission.claim(placed, now=1.0))
        assert waiters.admission.num_running_requests == 2
    assert waiters.woken == ["greedy", "a", "b", "greedy", "greedy"]


def test_tenants_get_places_by_their_weights() -> None:
    waiters = Waiters(num_places=1)
    running = admit(waiters.admission, caller=key("other"))
    waiting = [waiters.wait(key(name, weight)) for name, weight in (("heavy", 3), ("light", 1)) for _ in range(40)]
    for _ in range(20):
        running.release(now=1.0)
        placed = next(each for each in waiting if each.has_place)
        waiting.remove(placed)
        running = waiters.admission.claim(placed, now=1.0)
    assert waiters.woken.count("heavy") == 15


def test_a_place_that_its_waiter_gives_back_goes_to_the_next() -> None:
    waiters = Waiters(num_places=1)
    running = admit(waiters.admission, caller=key("x"))
    first, second = waiters.wait(key("a")), waiters.wait(key("b"))
    running.release(now=1.0)
    assert (first.has_place, second.has_place) == (True, False)
    waiters.admission.withdraw(first, now=1.0)
    waiters.admission.withdraw(first, now=1.0)
    assert second.has_place
    waiters.admission.claim(second, now=1.0).release(now=2.0)
    assert (waiters.admission.num_running_requests, waiters.admission.num_waiting_for_place) == (0, 0)


def test_a_waiter_whose_key_has_all_that_it_may_lets_others_pass() -> None:
    waiters = Waiters(num_places=2)
    bounded = key("bounded", running_requests=1)
    admit(waiters.admission, caller=bounded)
    other = admit(waiters.admission, caller=key("other"))
    waits, passes = waiters.wait(bounded), waiters.wait(key("late"))
    other.release(now=1.0)
    assert (waits.has_place, passes.has_place) == (False, True)


def test_the_queue_is_bounded_and_its_longest_part_gives_way() -> None:
    waiters = Waiters(num_places=1, max_waiting=4)
    admit(waiters.admission, caller=key("greedy"))
    for _ in range(4):
        waiters.wait(key("greedy"))
    with pytest.raises(OverloadedError):
        waiters.wait(key("greedy"))
    waiters.wait(key("small"))
    assert waiters.woken == ["greedy"], "its last one was pushed out"
    assert waiters.admission.num_waiting_for_place == 4
