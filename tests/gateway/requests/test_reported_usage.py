"""A key's limits at two gateways that tell each other what it uses."""

import pytest

from gateway.requests.admission import Admission, Bounds
from gateway.requests.key_limits import Caller
from gateway.requests.reported_usage import (
    MAX_REPORTED_KEYS,
    ReportedUsage,
    UsageElsewhere,
    decode_report,
    digest_of_key,
    encode_report,
)
from kvrelay.core.limit_names import LimitName
from kvrelay.errors import QuotaError, UnreadableStateError
from kvrelay.security.principal import Limits


class Two:
    """Two gateways, and the exchange between them."""

    def __init__(self) -> None:
        self.gateways = {name: Admission(Bounds(8, 10**6, 8)) for name in ("a", "b")}
        self.a, self.b = self.gateways.values()

    def exchange(self, now: float = 0.0) -> None:
        reports = {
            name: decode_report(encode_report(admission.report(now))) for name, admission in self.gateways.items()
        }
        for name, admission in self.gateways.items():
            admission.set_elsewhere({other: report for other, report in reports.items() if other != name}, now)


def key(**limits: int) -> Caller:
    return Caller("alice", "alice", Limits(**limits), waits=True)


def refused_by(limit: LimitName, admission: Admission, caller: Caller, now: float = 0.0) -> QuotaError:
    with pytest.raises(QuotaError) as refused:
        admission.check_room(caller, now)
    assert refused.value.limit == limit
    return refused.value


def test_requests_in_progress_count_at_both() -> None:
    two, caller = Two(), key(running_requests=3)
    places = [two.a.take_place(caller, 0.0) for _ in range(2)]
    two.exchange()
    two.b.take_place(caller, 0.0)
    assert "has 3 requests in progress" in refused_by(LimitName.RUNNING_REQUESTS, two.b, caller).message
    two.exchange()
    refused_by(LimitName.RUNNING_REQUESTS, two.a, caller)
    places[0].release(1.0)
    two.exchange()
    two.b.take_place(caller, 0.0)


def test_another_key_and_callers_without_credentials_do_not_count() -> None:
    two = Two()
    two.a.take_place(Caller("bert", "bert", Limits(running_requests=1)), 0.0)
    two.a.take_place(Caller(limits=Limits(running_requests=1)), 0.0)
    two.exchange()
    two.b.take_place(key(running_requests=1), 0.0)
    two.b.take_place(Caller(limits=Limits(running_requests=1)), 0.0)


def test_waiting_prompt_tokens_and_bytes_and_unattended_requests_count_at_both() -> None:
    two, caller = Two(), key(queued_prompt_tokens=100, stored_bytes=1000, unattended_requests=1)
    place = two.a.take_place(caller, 0.0)
    place.admit_prompt(90)
    place.set_unattended(True)
    two.exchange()
    other = two.b.take_place(caller, 0.0)
    with pytest.raises(QuotaError, match="90 prompt tokens waiting"):
        other.admit_prompt(11)
    with pytest.raises(QuotaError, match="without a client"):
        other.set_unattended(True)
    place.set_stored_bytes(1000)
    two.exchange()
    refused_by(LimitName.STORED_BYTES, two.b, caller)


def test_output_tokens_of_a_minute_are_one_budget() -> None:
    two, caller = Two(), key(output_tokens_per_minute=60)
    places = [admission.take_place(caller, 0.0) for admission in (two.a, two.b)]
    two.exchange()
    for _ in range(40):
        places[0].count_output_token()
    two.exchange()
    two.b.check_room(caller, 0.0)
    for _ in range(20):
        places[1].count_output_token()
    for _ in range(3):  # nothing is charged twice
        two.exchange()
    for admission in (two.a, two.b):
        assert 900 <= refused_by(LimitName.OUTPUT_TOKENS, admission, caller).retry_after_ms <= 1000
    two.a.check_room(caller, 1.1)
    two.b.check_room(caller, 1.1)


def test_a_key_that_comes_to_another_gateway_brings_what_it_has_used() -> None:
    two, caller = Two(), key(output_tokens_per_minute=60, formats_per_minute=1)
    place = two.a.take_place(caller, 0.0)
    two.a.take_format(caller, 0.0)
    for _ in range(60):
        place.count_output_token()
    two.exchange()
    refused_by(LimitName.OUTPUT_TOKENS, two.b, caller)
    with pytest.raises(QuotaError):
        two.b.take_format(caller, 0.0)


def test_a_gateway_that_is_gone_holds_nothing() -> None:
    two, caller = Two(), key(running_requests=1)
    two.a.take_place(caller, 0.0)
    two.exchange()
    refused_by(LimitName.RUNNING_REQUESTS, two.b, caller)
    two.b.set_elsewhere({}, 0.0)
    two.b.take_place(caller, 0.0)


def test_a_place_that_another_gateway_frees_goes_to_who_waits() -> None:
    two, caller = Two(), key(running_requests=1)
    here = [two.b.take_place(Caller("bert", "bert"), 0.0) for _ in range(8)]
    woken: list[bool] = []
    waiting = two.b.wait_for_place(caller, 0.0, lambda: woken.append(True))
    elsewhere = two.a.take_place(caller, 0.0)
    two.exchange()
    here[0].release(0.0)
    assert woken == [], "the key has all that it may have"
    elsewhere.release(0.0)
    two.exchange()
    assert woken == [True]
    two.b.claim(waiting, 0.0)


def test_a_gateway_that_counts_anew_is_charged_from_zero() -> None:
    elsewhere = UsageElsewhere()
    totals = [50, 80, 5]
    grown = [elsewhere.update({"a": {"k": ReportedUsage(num_output_tokens=total)}}) for total in totals]
    assert [each.get("k", ReportedUsage()).num_output_tokens for each in grown] == [0, 30, 5]


def test_a_report_is_bounded_and_names_no_key() -> None:
    report = {digest_of_key(f"key-{number}"): ReportedUsage(num_running=number) for number in range(2000)}
    data = encode_report(report)
    kept = decode_report(data)
    assert len(kept) == MAX_REPORTED_KEYS
    assert min(usage.num_running for usage in kept.values()) == 2000 - MAX_REPORTED_KEYS
    assert b"key-" not in data


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[1]", b"3", b'{"k": 1}', b'{"k": [1, -1]}', b'{"k": ["1"]}', b'{"k": [1,1,1,1,1,1,1,1,1]}']
)
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableStateError):
        decode_report(data)
