"""Rows of the catalogue in which a worker dies: the stream goes on elsewhere with the same tokens,
each once.
"""

import asyncio

import pytest

from kvrelay.errors import InternalError
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import wait_until
from kvrelay.testing.load import Outcome, Request, TokenCheck
from tests.faults.conftest import BLOCK_SIZE, Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

NUM_TOKENS = 24


def part_of_prompt(request: Request) -> str:
    """What the fault points of a worker see of this request alone."""
    return ", ".join(map(str, request.prompt[2:10]))


def assert_unharmed(outcome: Outcome, expected: object) -> None:
    assert outcome.error is None
    assert outcome.tokens == expected


@pytest.mark.parametrize("layer", [1, pytest.param(2, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.soak)])
async def test_p_dies_in_the_middle_of_the_pass(rig: Rig, layer: int) -> None:
    """Layers are counted over both chunks of the prompt: the third is the first of the second
    chunk.
    """
    request = rig.request()
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("prefill", "prefill.layer_written", at=layer)
    outcome = await rig.run(request)
    victim = await fault.wait_until_fired()
    await victim.wait_until_gone()
    assert_unharmed(outcome, expected)
    assert outcome.num_attempts > 1


@pytest.mark.soak
@pytest.mark.parametrize(
    "point", ["prefill.job_received", "prefill.push_opened", "prefill.chunk_sent", "prefill.end_sent"]
)
async def test_p_dies_in_the_middle_of_the_transfer(rig: Rig, point: str) -> None:
    request = rig.request()
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("prefill", point)
    outcome = await rig.run(request)
    await (await fault.wait_until_fired()).wait_until_gone()
    assert_unharmed(outcome, expected)


async def test_p_dies_after_d_has_it_all(rig: Rig) -> None:
    request = rig.request()
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("prefill", "prefill.transfer_acknowledged")
    outcome = await rig.run(request)
    await (await fault.wait_until_fired()).wait_until_gone()
    assert_unharmed(outcome, expected)
    assert outcome.num_attempts == 1, "nothing is done twice"


@pytest.mark.parametrize(
    "point",
    [
        "decode.step_begins",
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in ("decode.job_received", "decode.blocks_reserved", "decode.push_begun", "decode.push_complete")
        ),
    ],
)
async def test_d_dies_before_its_first_token(rig: Rig, point: str) -> None:
    request = rig.request()
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("decode", point)
    outcome = await rig.run(request)
    await (await fault.wait_until_fired()).wait_until_gone()
    assert_unharmed(outcome, expected)
    assert outcome.num_attempts > 1


@pytest.mark.parametrize(
    "num_tokens",
    [BLOCK_SIZE + 1, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 2, BLOCK_SIZE - 1, BLOCK_SIZE))],
)
@pytest.mark.parametrize("num_sequences", [1, pytest.param(3, marks=pytest.mark.soak)])
async def test_d_dies_after_token_n(rig: Rig, num_tokens: int, num_sequences: int) -> None:
    """The worker is held before the step that would compute the next token, and killed once the
    client has all before it.
    """
    request = rig.request(num_tokens=NUM_TOKENS, seed=5, num_sequences=num_sequences)
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("decode", "decode.step_begins", FaultAction.WAIT, at=num_tokens)
    check = TokenCheck(num_sequences)
    stream = rig.client.generate(**request.options)
    killed = False
    async for delta in stream:
        check.take(delta)
        if all(len(tokens) == num_tokens for tokens in check.tokens) and not killed:
            victim = await fault.wait_until_fired()
            await victim.kill()
            fault.disarm()
            killed = True
    assert killed
    assert check.result == expected
    assert stream.finished is not None
    assert stream.finished.phases.num_attempts == 2


async def test_d_dies_between_the_last_token_and_its_report(rig: Rig) -> None:
    request = rig.request(num_tokens=NUM_TOKENS)
    expected = await rig.expected(request)
    fault = rig.cluster.arm_one_of("decode", "decode.step_computed", at=NUM_TOKENS - 1)
    outcome = await rig.run(request)
    await (await fault.wait_until_fired()).wait_until_gone()
    assert_unharmed(outcome, expected)
    assert outcome.num_attempts == 2


@pytest.mark.soak
async def test_a_prompt_that_kills_workers_is_quarantined_after_two_deaths(rig: Rig) -> None:
    """Whoever computes a step with this prompt dies, as often as it is tried. Nobody
    else's request fails.
    """
    poison = rig.request(resumable=False)
    others = [rig.request(num_tokens=100) for _ in range(4)]
    expected = [await rig.expected(other) for other in others]
    workers = [*rig.cluster.of_role("decode"), *rig.cluster.of_role("prefill")]
    faults = [
        worker.arm(point, times=None, match=part_of_prompt(poison))
        for worker in workers
        for point in ("decode.step_begins", "prefill.step_begins")
    ]
    running = [asyncio.create_task(rig.run(other)) for other in others]
    outcome = await rig.run(poison)
    assert outcome.error is not None
    num_deaths = sum(fault.num_fired for fault in faults)
    rig.cluster.heal()
    await rig.cluster.restart_ended()
    for other, tokens in zip(await asyncio.gather(*running), expected, strict=True):
        assert_unharmed(other, tokens)
    assert num_deaths == 2
    assert isinstance(outcome.error, InternalError)


async def test_connections_that_break_under_a_request_again_and_again_are_no_deaths(rig: Rig) -> None:
    """Both times in a step of it, and the second while it ran alone: it would be guilty if anybody
    had died.
    """
    request = rig.request(num_tokens=NUM_TOKENS)
    expected = await rig.expected(request)
    workers = rig.cluster.of_role("decode")
    faults = [worker.arm("decode.step_begins", FaultAction.WAIT, match=part_of_prompt(request)) for worker in workers]
    running = asyncio.create_task(rig.run(request))
    broken: set[int] = set()

    def held_workers() -> list[int]:
        return [number for number, fault in enumerate(faults) if fault.num_fired and number not in broken]

    for _ in range(2):
        await wait_until(lambda: bool(held_workers()), "it is in a step of another worker")
        (number,) = held_workers()
        assert workers[number].link_from("gateway").close() > 0
        broken.add(number)
    for fault in faults:
        fault.disarm()
    outcome = await running
    assert_unharmed(outcome, expected)
    assert outcome.num_attempts > len(broken)
