"""Rows of the catalogue in which a worker hangs, comes back as a zombie, or only stands still for a
moment.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from kvrelay.client import AsyncClient
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import FaultProcess, wait_until
from kvrelay.testing.load import Outcome
from tests.faults.conftest import LIVENESS_WINDOW_S, STEP_TIMEOUT_S, Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

NUM_TOKENS = 150
"""Many more than the steps until a stop, also where a step has several of them."""
HANG_MS = 50_000
SHORT_STOP_S = 0.3 * LIVENESS_WINDOW_S


async def run_with_stop(rig: Rig, until: Callable[[FaultProcess], Awaitable[None]], *, at: int = 20) -> Outcome:
    """Stops the decode worker of a stream at its `at`-th step, until then; what came of the stream,
    with the right tokens.
    """
    request = rig.request(num_tokens=NUM_TOKENS)
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("decode", "decode.step_begins", FaultAction.STOP, at=at)
    running = asyncio.create_task(rig.run(request))
    victim = await fault.wait_until_fired()
    await wait_until(lambda: victim.state == "T", f"{victim.name} has stopped itself")
    fault.disarm()
    await until(victim)
    assert victim.state == "T", "nobody else has continued it"
    await victim.resume()
    outcome = await running
    assert victim.is_running, "a worker that stood still does not take itself for one that hangs"
    assert fault.num_fired == 1
    assert outcome.error is None
    assert outcome.tokens == expected
    return outcome


@pytest.mark.parametrize("times", [1, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3000)])])
async def test_a_zombie_that_comes_back_after_its_lease_is_not_heard(rig: Rig, times: int) -> None:
    """Stopped for longer than its window: the stream is elsewhere when it goes on, and all that it
    says is dropped.
    """

    async def given_up(victim: FaultProcess) -> None:
        for gateway in rig.cluster.of_role("gateway"):
            async with rig.cluster.client(gateway.name) as client:
                await wait_until(partial(is_missing, client, victim.name), f"{gateway.name} has given {victim.name} up")

    async def is_missing(client: AsyncClient, name: str) -> bool:
        return name not in await rig.cluster.connected_workers(client)

    for _ in range(times):
        outcome = await run_with_stop(rig, given_up)
        assert outcome.num_attempts == 2
        assert outcome.longest_pause_s > 0.5, "it was stopped in the middle of the stream"
        await rig.cluster.wait_until_ready()
        await rig.cluster.check()


async def test_a_worker_that_stood_still_for_longer_than_a_step_may_take_goes_on(rig: Rig) -> None:
    """As in a suspended machine: its engine does not hang."""
    victims: list[FaultProcess] = []

    async def long_enough(victim: FaultProcess) -> None:
        victims.append(victim)
        await asyncio.sleep(1.2 * STEP_TIMEOUT_S)

    outcome = await run_with_stop(rig, long_enough)
    assert outcome.num_attempts == 2
    (victim,) = victims
    await rig.cluster.wait_until_ready()
    assert victim.is_running
    await rig.cluster.check()


async def test_a_stall_shorter_than_the_window_aborts_nothing(rig: Rig) -> None:
    outcome = await run_with_stop(rig, lambda _: asyncio.sleep(SHORT_STOP_S))
    assert outcome.num_attempts == 1
    assert outcome.longest_pause_s > SHORT_STOP_S * 0.8, "it was stopped in the middle of the stream"


@pytest.mark.parametrize(("role", "point"), [("decode", "decode.tokens_reported"), ("prefill", "prefill.job_received")])
async def test_a_worker_whose_event_loop_hangs_is_given_up(rig: Rig, role: str, point: str) -> None:
    request = rig.request(num_tokens=100)
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of(role, point, FaultAction.WAIT, wait_ms=HANG_MS)
    outcome = await rig.run(request)
    assert fault.num_fired == 1
    fault.disarm()
    assert outcome.error is None
    assert outcome.tokens == expected
    assert outcome.num_attempts == 2
    assert outcome.longest_pause_s < HANG_MS / 1000, "nobody waited for it"
    await rig.cluster.wait_until_ready()


@pytest.mark.parametrize(
    ("role", "point"),
    [("decode", "decode.step_begins"), pytest.param("prefill", "prefill.step_begins", marks=pytest.mark.soak)],
)
async def test_a_worker_whose_engine_hangs_ends_itself(rig: Rig, role: str, point: str) -> None:
    """Its event loop goes on answering heartbeats; the process notices by itself."""
    request = rig.request(num_tokens=100)
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of(role, point, FaultAction.WAIT, at=2 if role == "decode" else 1, wait_ms=HANG_MS)
    outcome = await rig.run(request)
    await (await fault.wait_until_fired()).wait_until_gone()
    assert outcome.error is None
    assert outcome.tokens == expected
    assert outcome.num_attempts == 2
    assert outcome.longest_pause_s > STEP_TIMEOUT_S * 0.5
