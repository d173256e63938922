"""Rows of the catalogue in which bytes between two processes are cut, held back or flipped. Nobody
dies.
"""

import asyncio

import pytest

from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import Link
from kvrelay.testing.load import Request
from tests.faults.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

PROMPT_TOKENS = 100
CUTS = {"first byte": 0.0, "header": 0.02, "middle": 0.5, "last byte": 0.97}
"""Where a push is cut, as shares of the bytes of one that is not: what comes first are its headers
and its opening message.
"""


def push_links(rig: Rig) -> list[Link]:
    """All links over which KV may travel."""
    names = [process.name for process in rig.cluster.of_role("prefill")]
    return [worker.link_from(name) for worker in rig.cluster.of_role("decode") for name in names]


async def fresh_gateway(rig: Rig) -> None:
    """Makes the gateway forget which pairs of workers it leaves alone."""
    await rig.cluster["gateway"].kill()
    await rig.cluster["gateway"].start_again()
    await rig.wait_until_enough_works()


async def push_bytes(rig: Rig, request: Request) -> int:
    """How many bytes the push of such a request has."""
    links = push_links(rig)
    before = [link.to_target.num_bytes for link in links]
    assert (await rig.run(request)).error is None
    return max(link.to_target.num_bytes - old for link, old in zip(links, before, strict=True))


@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=[] if name == "middle" else [pytest.mark.soak]) for name in CUTS]
)
async def test_p_and_d_lose_each_other_in_the_middle_of_the_transfer(rig: Rig, where: str) -> None:
    """D drops the part it has and asks again; the blocks are free at the end, which the fixture
    checks.
    """
    await fresh_gateway(rig)
    total = await push_bytes(rig, rig.request(prompt_tokens=PROMPT_TOKENS, num_tokens=2))
    request = rig.request(prompt_tokens=PROMPT_TOKENS)
    expected = await rig.expected(request)
    for link in push_links(rig):
        link.to_target.cut_at(int(total * CUTS[where]))
    outcome = await rig.run(request)
    assert outcome.error is None
    assert outcome.tokens == expected
    assert sum(link.to_target.count("cut") for link in push_links(rig)) >= 1


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_a_push_is_cut_at_every_hundredth_of_its_bytes_in_either_direction(rig: Rig) -> None:
    num_cuts = 0
    for number in range(200):
        if number % 2 == 0:
            await fresh_gateway(rig)
        request = rig.request(prompt_tokens=PROMPT_TOKENS)
        expected = await rig.expected(request)
        total = await push_bytes(rig, rig.request(prompt_tokens=PROMPT_TOKENS, num_tokens=2))
        for link in push_links(rig):
            if number % 2:
                link.to_target.cut_at(total * (number // 2) // 100)
            else:
                link.to_source.cut_at(number // 2)
        before = [link.to_target.count("cut") + link.to_source.count("cut") for link in push_links(rig)]
        outcome = await rig.run(request)
        after = [link.to_target.count("cut") + link.to_source.count("cut") for link in push_links(rig)]
        num_cuts += sum(after) - sum(before)
        rig.cluster.heal()
        assert outcome.error is None
        assert outcome.tokens == expected
        await rig.cluster.check()
    assert num_cuts > 100


async def test_a_corrupt_chunk_is_refused_and_sent_once_more(rig: Rig) -> None:
    await fresh_gateway(rig)
    total = await push_bytes(rig, rig.request(prompt_tokens=PROMPT_TOKENS, num_tokens=2))
    request = rig.request(prompt_tokens=PROMPT_TOKENS)
    expected = await rig.expected(request)
    before = [link.to_target.count("flip") for link in push_links(rig)]
    for link in push_links(rig):
        link.to_target.flip_at(total // 2)
    outcome = await rig.run(request)
    assert sum(link.to_target.count("flip") for link in push_links(rig)) > sum(before)
    assert outcome.error is None
    assert outcome.tokens == expected
    if rig.cluster.security is not None:
        return  # TLS has ended the connection before a digest is looked at
    refusals = [worker for worker in rig.cluster.of_role("decode") if "refused a KV chunk" in worker.log_tail]
    assert refusals, "the digest was looked at"


@pytest.mark.parametrize("direction", ["to_target", pytest.param("to_source", marks=pytest.mark.soak)])
async def test_p_and_d_cannot_reach_each_other_and_are_both_alive(rig: Rig, direction: str) -> None:
    """Another pair does it, or the decode worker itself; and the pair is left alone for a while."""
    await fresh_gateway(rig)
    request = rig.request(prompt_tokens=PROMPT_TOKENS, timeout_s=60.0)
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("prefill", "prefill.push_opened", FaultAction.WAIT)
    running = asyncio.create_task(rig.run(request))
    sender = await fault.wait_until_fired()
    (seen,) = (await rig.client.cluster()).running_requests
    receiver = await rig.cluster.worker_of(rig.client, seen.request_id)
    held = getattr(receiver.link_from(sender.name), direction)
    num_before = held.count("hold")
    held.hold()
    if direction == "to_source":  # a connection that is open may carry a whole push without an answer
        receiver.link_from(sender.name).close()
    fault.disarm()
    outcome = await running
    assert held.count("hold") > num_before
    assert outcome.error is None
    assert outcome.tokens == expected
    assert outcome.num_attempts == 2
    # While the pair is left alone, requests need no second attempt.
    assert (await rig.run(rig.request(prompt_tokens=PROMPT_TOKENS))).num_attempts == 1


@pytest.mark.parametrize("direction", ["to_target", "to_source"])
async def test_a_gateway_and_a_worker_cannot_hear_each_other(rig: Rig, direction: str) -> None:
    """Heartbeats: noticed whichever direction is dead, and the request goes on elsewhere."""
    request = rig.request()
    expected = await rig.expected(request)
    # Its engine waits, its event loop does not: nothing is lost but what the link holds.
    async with rig.held(request) as stream:
        worker = stream.worker
        link = getattr(worker.link_from("gateway"), direction)
        num_before = link.count("hold")
        link.hold()
        outcome = await stream.outcome
    assert link.count("hold") > num_before
    assert outcome.error is None
    assert outcome.tokens == expected
    assert outcome.num_attempts == 2
    rig.cluster.heal()
    assert worker.is_running, "it was not killed"
    await rig.cluster.wait_until_ready()


async def test_a_slow_link_between_gateway_and_worker_only_slows(rig: Rig) -> None:
    request = rig.request(num_tokens=30)
    expected = await rig.expected(request)
    for worker in rig.cluster.of_role("decode"):
        worker.link_from("gateway").to_source.latency_s = 0.02
    outcome = await rig.run(request)
    assert outcome.error is None
    assert outcome.tokens == expected
    assert outcome.num_attempts == 1
    assert outcome.duration_s > 0.02
