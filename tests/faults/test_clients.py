"""Rows of the catalogue about gateways and clients: deaths, disconnects, slow readers, repeated
keys, deadlines, clocks.
"""

import asyncio
import time

import pytest

from kvrelay.errors import DeadlineError, IdempotencyConflictError, KvrelayError, UnavailableError
from kvrelay.testing import FaultAction, FaultCluster, make_tiny_llama, wait_until
from kvrelay.testing.load import TokenCheck, fault_free_tokens, make_request, run_request
from kvrelay.testing.scenarios.disconnects import POINTS, disconnect_at
from tests.faults.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

MAX_PENDING_MS = 30_000
"""A bound against hanging only. What is promised, 250 ms, is measured by `python -m kvrelay.testing
disconnects`.
"""


async def test_g_dies_and_a_resumable_request_goes_on_at_another_gateway(rig: Rig) -> None:
    request = rig.request(num_tokens=100, resumable=True)
    expected = await rig.expected(request)
    async with rig.cluster.client("gateway-1", "gateway") as client, rig.held(request, client) as held:
        await rig.cluster["gateway-1"].kill()
        held.release()
        outcome = await held.outcome
    assert outcome.error is None
    assert outcome.tokens == expected


async def test_g_dies_and_other_requests_end_as_unavailable_never_as_ok_with_a_cut_text(rig: Rig) -> None:
    request = rig.request(num_tokens=100)
    async with rig.cluster.client("gateway-1") as client, rig.held(request, client) as held:
        await rig.cluster["gateway-1"].kill()
        held.release()
        outcome = await held.outcome
    assert not rig.cluster["gateway-1"].is_running
    assert isinstance(outcome.error, UnavailableError)
    assert 0 < len(outcome.tokens[0]) < 100
    assert outcome.num_attempts == 0, "it was told no end"


async def test_clients_disconnect_at_every_step(rig: Rig) -> None:
    """All points in one test, since each takes a tenth of a second only."""
    for point in POINTS:
        rig.number += 1
        assert await disconnect_at(rig.cluster, rig.client, point, 20_000 + rig.number) < MAX_PENDING_MS, point


async def test_a_slow_client_delays_nobody_else_and_gets_everything(rig: Rig) -> None:
    slow, others = rig.request(num_tokens=300), [rig.request(num_tokens=60) for _ in range(4)]
    expected = await rig.expected(slow)
    check = TokenCheck(1)
    num_pauses = 0
    stream = rig.client.generate(**slow.options)
    async for delta in stream:
        check.take(delta)
        if num_pauses < 3:
            num_pauses += 1
            outcomes = await asyncio.gather(*(rig.run(other) for other in others))
            assert all(outcome.error is None for outcome in outcomes)
    assert num_pauses == 3
    assert check.result == expected


@pytest.mark.soak
async def test_a_client_that_reads_one_frame_a_second_pauses_its_own_sequences_only() -> None:
    """More is on its way to it than the buffers between take: its own work is paused, and nobody
    else's.
    """
    slow = make_request(1, num_tokens=1500, num_sequences=8, timeout_s=240.0)
    others = [make_request(number, num_tokens=60) for number in range(2, 6)]
    cluster = FaultCluster(
        model=make_tiny_llama(max_context_tokens=2048),
        engine={"num_kv_blocks": 4096},
        requests={"max_unread_tokens": 64},
    )
    async with cluster, cluster.client() as client, cluster.client() as other_client:
        expected = await fault_free_tokens(client, [slow, *others])
        paused = cluster["gateway"].arm("gateway.set_paused_sent", FaultAction.COUNT, times=None)
        check = TokenCheck(slow.num_sequences)
        was_paused, num_pauses = False, 0
        async for delta in client.generate(**slow.options):
            check.take(delta)
            if was_paused:
                continue
            await asyncio.sleep(1.0)
            if paused.num_fired:
                was_paused = True
                outcomes = await asyncio.gather(*(run_request(other_client, other) for other in others))
                assert [outcome.tokens for outcome in outcomes] == [expected[other] for other in others]
                assert [outcome.num_attempts for outcome in outcomes] == [1] * len(others)
                num_pauses = paused.num_fired
        assert was_paused
        assert check.result == expected[slow]
        assert paused.num_fired > num_pauses, "it was still paused when the others had ended, and went on"
        await cluster.check()


async def test_the_same_idempotency_key_fifty_times_at_once_is_one_request(rig: Rig) -> None:
    request = rig.request(num_tokens=60, seed=3)
    expected = await rig.expected(request)
    key = f"key-{request.tenant}"

    async with rig.cluster.client("gateway-1") as other:

        async def run(number: int) -> tuple[str, tuple[tuple[int, ...], ...]]:
            completion = await (rig.client if number % 2 else other).complete(**request.options, idempotency_key=key)
            return completion.accepted.request_id, (tuple(token.token_id for token in completion.outputs[0].tokens),)

        results = await asyncio.gather(*(run(number) for number in range(50)))
    assert len({request_id for request_id, _ in results}) == 1
    assert {tokens for _, tokens in results} == {expected}
    with pytest.raises(IdempotencyConflictError):
        await rig.client.complete(**(request.options | {"max_tokens": 61}), idempotency_key=key)


@pytest.mark.parametrize(
    "timeouts_ms", [(1, 5, 20, 60, 120, 200), pytest.param(tuple(range(1, 201)), marks=pytest.mark.soak)]
)
async def test_a_deadline_is_kept_on_every_hop_and_frees_everything(rig: Rig, timeouts_ms: tuple[int, ...]) -> None:
    num_expired = 0
    for timeout_ms in timeouts_ms:
        request = rig.request(num_tokens=450, timeout_s=timeout_ms / 1000)
        begin = time.monotonic()
        outcome = await rig.run(request)
        assert outcome.error is None or isinstance(outcome.error, DeadlineError)
        num_expired += outcome.error is not None
        assert time.monotonic() - begin < timeout_ms / 1000 + MAX_PENDING_MS / 1000
        await wait_until(lambda: nothing_runs(rig), "blocks are free after the deadline")
    assert num_expired > 0


async def nothing_runs(rig: Rig) -> bool:
    seen = await rig.client.cluster()
    return not seen.running_requests and not any(worker.load.num_used_blocks for worker in seen.workers)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
async def test_the_clock_jumps_by_an_hour_and_nothing_happens(rig: Rig, jump_s: float) -> None:
    """In all processes at once, in the middle of a stream: leases and deadlines go by monotonic
    time.
    """
    request, later = rig.request(num_tokens=100), rig.request()
    expected = [await rig.expected(request), await rig.expected(later)]
    async with rig.held(request) as held:
        rig.wall_clock_offset.write_text(str(jump_s))
        held.release()
        outcome = await held.outcome
    assert outcome.error is None
    assert outcome.tokens == expected[0]
    assert outcome.num_attempts == 1
    after = await rig.run(later)
    assert after.tokens == expected[1]
    assert after.request_id is not None
    info = await rig.client.get_request(after.request_id)
    assert abs(info.create_time.timestamp() - time.time() - jump_s) < 600, "the clock was off where it is only shown"
    assert all(worker.connected for worker in (await rig.client.cluster()).workers)


async def test_a_late_write_after_a_cancel_keeps_its_blocks_until_it_has_ended(rig: Rig) -> None:
    """I4: the blocks of a push whose client has gone are nobody else's while a thread still writes
    into them.
    """
    request, other = rig.request(num_tokens=400), rig.request()
    expected = await rig.expected(other)
    fault = rig.cluster.arm_one_of("decode", "decode.chunk_write_begins", FaultAction.WAIT, wait_ms=20_000)
    stream = rig.client.generate(**request.options)
    reading = asyncio.create_task(drain(stream))
    victim = await fault.wait_until_fired()
    await stream.cancel()
    await reading
    # Another request on whichever worker: it gets other blocks, and its tokens are right.
    assert (await rig.run(other)).tokens == expected
    seen = await rig.client.cluster()
    (held,) = [worker for worker in seen.workers if rig.cluster.name_of_worker(worker) == victim.name]
    assert held.load.num_used_blocks > 0
    fault.disarm()
    await wait_until(lambda: nothing_runs(rig), "the blocks are free once the writer has ended")


async def drain(stream: object) -> None:
    try:
        async for _ in stream:  # type: ignore[attr-defined]
            pass
    except KvrelayError:
        pass
