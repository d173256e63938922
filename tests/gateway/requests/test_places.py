"""Requests take a place before anything is spent on them, and wait for one in turn."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.requests.admission import Admission, Bounds
from gateway.requests.starter import RequestStarter
from gateway.telemetry.metrics import GatewayMetrics
from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.config.settings import RequestSettings
from kvrelay.core.limit_names import LimitName
from kvrelay.errors import OverloadedError, QuotaError
from kvrelay.security.principal import LOCAL, Limits, Principal, Role, set_current_principal

FAR = 3600.0


class Gateway:
    """Only what gives out places."""

    def __init__(self, num_places: int, place_wait_ms: int = 3_600_000, max_waiting_requests: int = 100) -> None:
        self.metrics = GatewayMetrics()
        self.admission = Admission(Bounds(num_places, 10**6, max_waiting_requests))
        settings = RequestSettings(max_running_requests=num_places)
        context: Any = SimpleNamespace(settings=settings, metrics=self.metrics)
        nothing: Any = None
        writer: Any = SimpleNamespace(check_room=lambda: None)
        quotas = QuotaSettings(place_wait_ms=place_wait_ms)
        self.starter = RequestStarter("g", nothing, self.admission, nothing, writer, context, quotas)

    async def hold(self, holder: Principal, until: asyncio.Event, held: asyncio.Event | None = None) -> None:
        """Runs a request that ends with `until`."""
        set_current_principal(holder)
        async with self.starter.place(holder.tenant or "", asyncio.get_running_loop().time() + FAR):
            if held is not None:
                held.set()
            await until.wait()

    async def all_waiting(self, number: int) -> None:
        for _ in range(100):
            if self.admission.num_waiting_for_place == number:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{self.admission.num_waiting_for_place} requests wait")


def principal(name: str, **limits: int) -> Principal:
    return Principal(frozenset({Role.CLIENT}), name, name, Limits(**limits))


@contextmanager
def calling(caller: Principal) -> Iterator[None]:
    set_current_principal(caller)
    try:
        yield
    finally:
        set_current_principal(LOCAL)


@pytest.fixture(autouse=True)
def bound() -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 60, "nothing waited out a timeout"


async def test_a_key_gets_half_of_the_places_and_is_refused_by_name() -> None:
    gateway = Gateway(num_places=4)
    ends = asyncio.Event()
    running = [asyncio.create_task(gateway.hold(principal("greedy"), ends)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QuotaError, match="greedy"):
        await gateway.hold(principal("greedy"), ends)
    held = asyncio.Event()
    running.append(asyncio.create_task(gateway.hold(principal("small"), ends, held)))
    await held.wait()
    assert gateway.metrics.quota_refusals[LimitName.RUNNING_REQUESTS] == 1
    assert gateway.metrics.refusals["QUOTA_EXCEEDED"] == 1
    ends.set()
    await asyncio.gather(*running)
    assert gateway.admission.num_running_requests == 0


async def test_an_entry_of_the_file_of_keys_goes_before_the_defaults() -> None:
    gateway = Gateway(num_places=4)
    ends = asyncio.Event()
    running = [asyncio.create_task(gateway.hold(principal("greedy", running_requests=3), ends)) for _ in range(3)]
    await asyncio.sleep(0)
    assert gateway.admission.num_running_requests == 3
    ends.set()
    await asyncio.gather(*running)


async def test_a_request_waits_for_a_place_instead_of_being_refused() -> None:
    gateway = Gateway(num_places=1)
    ends, held = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(gateway.hold(principal("greedy"), ends))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(gateway.hold(principal("small"), ends, held))
    await gateway.all_waiting(1)
    ends.set()
    await asyncio.gather(running, waiting)
    assert held.is_set()
    assert (gateway.admission.num_running_requests, gateway.admission.num_waiting_for_place) == (0, 0)


async def test_a_wait_for_a_place_ends_with_a_refusal_that_says_when_to_retry() -> None:
    gateway = Gateway(num_places=1, place_wait_ms=1)
    ends = asyncio.Event()
    running = asyncio.create_task(gateway.hold(principal("greedy"), ends))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError) as refused:
        await gateway.hold(principal("small"), ends)
    assert refused.value.retry_after_ms > 0
    assert gateway.metrics.refusals["OVERLOADED"] == 1
    assert gateway.admission.num_waiting_for_place == 0
    ends.set()
    await running


async def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue() -> None:
    gateway = Gateway(num_places=1)
    ends = asyncio.Event()
    running = asyncio.create_task(gateway.hold(principal("greedy"), ends))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(gateway.hold(principal(name), ends)) for name in ("a", "b")]
    await gateway.all_waiting(2)
    waiting[0].cancel()
    ends.set()
    running_too = asyncio.create_task(gateway.hold(principal("c"), ends))
    waiting[1].cancel()  # it may have got the place already
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(running, *waiting)
    await running_too
    assert (gateway.admission.num_running_requests, gateway.admission.num_waiting_for_place) == (0, 0)


async def test_callers_without_credentials_are_refused_at_once_and_have_all_places() -> None:
    gateway = Gateway(num_places=2)
    ends = asyncio.Event()
    running = [asyncio.create_task(gateway.hold(LOCAL, ends)) for _ in range(2)]
    await asyncio.sleep(0)
    assert gateway.admission.num_running_requests == 2
    with pytest.raises(OverloadedError) as refused:
        await gateway.hold(LOCAL, ends)
    assert not isinstance(refused.value, QuotaError)
    ends.set()
    await asyncio.gather(*running)


async def test_a_request_that_cannot_be_prepared_gives_its_place_back() -> None:
    gateway = Gateway(num_places=1)
    with calling(principal("one")), pytest.raises(ValueError, match="no prompt"):
        async with gateway.starter.place("one", asyncio.get_running_loop().time() + FAR):
            raise ValueError("no prompt")
    assert gateway.admission.num_running_requests == 0


async def test_formats_count_for_the_key_that_has_them_compiled() -> None:
    gateway = Gateway(num_places=1)
    with calling(principal("greedy", formats_per_minute=1)):
        gateway.starter.take_format()
        with pytest.raises(QuotaError, match="greedy"):
            gateway.starter.take_format()
    with calling(principal("small", formats_per_minute=1)):
        gateway.starter.take_format()
