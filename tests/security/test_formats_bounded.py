"""No response format takes more than its bounds, and others are served meanwhile."""

import asyncio
import os
import re
import resource
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, event, given, settings, target

from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.runtime.confined_child import Limit
from kvrelay.runtime.confined_pool import ConfinedPool
from kvrelay.structured_output.format_checks import CPU_MS, QUICK, QUICK_CPU_MS, SLOW, WALL_MS, FormatChecks
from kvrelay.testing.waiting import wait_until
from tests.security.format_bombs import BOMBS, formats

MIB = 1 << 20
MAX_GROWTH_BYTES = 32 * MIB
TICK_S = 0.02
"""The kernel counts processor time in ticks of at most 10 ms."""


@pytest.fixture
async def checks() -> AsyncIterator[FormatChecks]:
    made = FormatChecks(slow=ConfinedPool("a patient check", SLOW, num_children=1, max_wait_s=3600))
    yield made
    await made.close()


def pids_of(checks: FormatChecks) -> set[int]:
    return {*checks.quick.pids, *checks.slow.pids}


def rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def children_of_this_process() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return set(map(int, file.read().split()))


async def test_bombs_end_with_their_children_while_others_formats_are_served(checks: FormatChecks) -> None:
    await checks.check(ResponseFormat.regex("warm"))
    before, own = rss_bytes(), children_of_this_process() - pids_of(checks)
    bombs = [asyncio.create_task(checks.check(bomb)) for bomb in BOMBS.values()]
    await wait_until(lambda: checks.slow.num_started > 0, "a bomb burns")
    for number in range(5):
        await checks.check(ResponseFormat.regex(f"yes|no{number}"))
    assert not all(bomb.done() for bomb in bombs), "the others' formats did not wait for the last one"
    failures = await asyncio.gather(*bombs, return_exceptions=True)
    for bomb, failure in zip(BOMBS.values(), failures, strict=True):
        assert isinstance(failure, InvalidRequestError), bomb.source
        assert failure.field == bomb.field
        assert re.search(r"takes more than (2 s of processor time|512 MiB of memory) .* make it simpler", str(failure))
    assert checks.slow.num_killed[Limit.TIME] + checks.slow.num_killed[Limit.MEMORY] == len(BOMBS)
    assert children_of_this_process() - own == pids_of(checks), "no killed child is left"
    assert rss_bytes() - before <= MAX_GROWTH_BYTES


async def test_a_bomb_that_comes_again_costs_nothing_more(checks: FormatChecks) -> None:
    bomb = BOMBS["allOf of patterns"]
    for _ in range(3):
        with pytest.raises(InvalidRequestError):
            await checks.check(bomb)
    assert [sum(pool.num_killed.values()) for pool in (checks.quick, checks.slow)] == [1, 1]
    assert checks.outcomes["time"] == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(formats())
def test_no_format_that_a_search_finds_takes_more_than_its_bounds(searched: ResponseFormat) -> None:
    async def check() -> float:
        pool = ConfinedPool("a search", QUICK)
        slow = ConfinedPool("a search", replace(SLOW, cpu_ms=1), num_children=1)
        checks = FormatChecks(pool, slow)
        await checks.check(ResponseFormat.regex("warm"))
        [pid] = pool.pids
        before_s = cpu_s(pid)
        try:
            await checks.check(searched)
        except InvalidRequestError as error:
            event(error.problem[:20])
        spent_s = cpu_s(pid) - before_s if pid in pool.pids else QUICK_CPU_MS / 1000
        await checks.close()
        assert pid not in children_of_this_process()
        return spent_s

    spent_s = asyncio.run(check())
    target(spent_s, label="processor seconds of the child")
    assert spent_s <= QUICK_CPU_MS / 1000 + 3 * TICK_S


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_bombs_would_burn_on_without_a_limit() -> None:
    """Otherwise the tests above show nothing."""

    async def check(bomb: ResponseFormat) -> int:
        longer = replace(SLOW, cpu_ms=2 * CPU_MS, wall_ms=10 * WALL_MS, memory_bytes=4096 * MIB)
        checks = FormatChecks(slow=ConfinedPool("a longer check", longer))
        with pytest.raises(InvalidRequestError):
            await checks.check(bomb)
        await checks.close()
        return checks.outcomes["time"]

    assert asyncio.run(check(BOMBS["beside a model's token"])) == 1
