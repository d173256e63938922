"""What a running request counts for its key: tokens, bytes, and that it has no reader."""

from dataclasses import replace
from typing import Any

import pytest

from gateway.requests.admission import Admission, Bounds
from gateway.requests.key_limits import Caller
from kvrelay.core.limit_names import LimitName
from kvrelay.errors import QuotaError
from kvrelay.security.principal import Limits
from tests.gateway.streaming.test_slow_readers import Bench


def bench_of(admission: Admission, caller: Caller, **request: Any) -> Bench:
    bench = Bench(resume_grace_ms=3_600_000)
    bench.runner.request = replace(bench.runner.request, **request)
    bench.runner._admitted = admission.admit_anyway(3, caller, 0.0)
    return bench


def refusal_of_next(admission: Admission, caller: Caller) -> str:
    with pytest.raises(QuotaError) as refused:
        admission.take_place(caller, 0.0)
    return refused.value.limit


async def test_each_output_token_counts() -> None:
    caller, admission = Caller("k", "k", Limits(output_tokens_per_minute=4)), Admission(Bounds(10, 1000))
    bench = bench_of(admission, caller)
    reader = bench.runner.open_reader()
    bench.say(3)
    admission.take_place(caller, 0.0)
    bench.say(1)
    assert refusal_of_next(admission, caller) == LimitName.OUTPUT_TOKENS
    reader.close()


async def test_a_request_that_its_client_has_left_counts_until_one_is_back() -> None:
    caller, admission = Caller("k", "k", Limits(unattended_requests=1)), Admission(Bounds(10, 1000))
    first, second = (bench_of(admission, caller, resumable=True) for _ in range(2))
    first.runner.open_reader().close()
    assert admission.usage_of(caller, 0.0).num_unattended == 1
    second.runner.open_reader().close()
    assert isinstance(second.runner.output.error, QuotaError)
    assert not first.runner.ended
    first.runner.open_reader()
    assert admission.usage_of(caller, 0.0).num_unattended == 0
    first.runner.cancel()


async def test_what_the_store_keeps_of_an_ended_request_counts_on() -> None:
    caller, admission = Caller("k", "k", Limits(stored_bytes=100)), Admission(Bounds(10, 1000, retention_s=60.0))
    bench = bench_of(admission, caller, keeps_output=True)
    reader = bench.runner.open_reader()
    bench.say(5)
    bench.runner.cancel()
    assert admission.num_running_requests == 0
    assert refusal_of_next(admission, caller) == LimitName.STORED_BYTES
    reader.close()
