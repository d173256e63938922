"""Children that stay within their limits or die, and a line before them that is bounded."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvrelay.errors import OverloadedError, UnavailableError
from kvrelay.runtime.confined_child import Confinement, Limit, OverLimitError
from kvrelay.runtime.confined_main import MAX_OPEN_FILES
from kvrelay.runtime.confined_pool import ConfinedPool
from kvrelay.testing.waiting import wait_until

MEMORY_BYTES = 128 << 20
CONFINEMENT = Confinement("tests.support.confined_handler", 300, 60_000, MEMORY_BYTES, niceness=3)
MAX_ANSWER_BYTES = 10_000


def make_pool(confinement: Confinement = CONFINEMENT, **bounds: float) -> ConfinedPool:
    return ConfinedPool("the obedience of tests", confinement, **bounds)  # type: ignore[arg-type]


@pytest.fixture
async def pool() -> AsyncIterator[ConfinedPool]:
    made = make_pool()
    yield made
    await made.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def ask(pool: ConfinedPool, command: str) -> bytes:
    return await pool.ask(command.encode(), MAX_ANSWER_BYTES)


async def test_no_child_runs_before_it_is_needed_and_one_serves_what_comes_one_by_one(pool: ConfinedPool) -> None:
    assert pool.pids == ()
    assert [await ask(pool, f"echo {number}") for number in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    assert (len(pool.pids), pool.num_started) == (1, 1)


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        ("spin", Limit.TIME),
        ("spin-in-native-code 900000", Limit.TIME),
        (f"take {2 * MEMORY_BYTES + (256 << 20)}", Limit.MEMORY),
        ("crash", Limit.MEMORY),
        (f"answer {MAX_ANSWER_BYTES + 1}", Limit.ANSWER),
    ],
)
async def test_a_request_over_a_limit_ends_its_child_and_no_other_request(
    pool: ConfinedPool, command: str, limit: Limit
) -> None:
    await ask(pool, "echo")
    [first] = pool.pids
    with pytest.raises(OverLimitError) as over:
        await ask(pool, command)
    assert over.value.limit is limit
    assert pool.num_killed[limit] == 1
    assert not is_alive(first)
    assert await ask(pool, "echo again") == b"again"
    assert first not in pool.pids


async def test_a_request_that_uses_no_processor_time_ends_by_the_clock() -> None:
    pool = make_pool(replace(CONFINEMENT, wall_ms=100))
    with pytest.raises(OverLimitError) as over:
        await ask(pool, "sleep 3600")
    assert over.value.limit is Limit.TIME
    assert pool.pids == ()
    await pool.close()


async def test_others_are_served_while_one_spins() -> None:
    pool = make_pool(replace(CONFINEMENT, cpu_ms=3_600_000, wall_ms=3_600_000))
    spinning = asyncio.create_task(ask(pool, "spin"))
    await wait_until(lambda: pool.num_started == 1, "a child spins")
    assert [await ask(pool, f"echo {number}") for number in range(3)] == [b"0", b"1", b"2"]
    assert not spinning.done()
    pids = pool.pids
    await pool.close()
    assert not any(map(is_alive, pids))
    with pytest.raises(asyncio.CancelledError):
        await spinning


@pytest.mark.parametrize("command", ["spin", "spin-in-native-code 900000"])
async def test_processor_time_ends_a_request_whatever_the_clock_allows(command: str) -> None:
    pool = make_pool(replace(CONFINEMENT, wall_ms=3_600_000))
    async with asyncio.timeout(60):  # bounds a hang only
        with pytest.raises(OverLimitError) as over:
            await ask(pool, command)
    assert over.value.limit is Limit.TIME
    await pool.close()


async def test_no_more_wait_before_the_children_than_may() -> None:
    pool = make_pool(replace(CONFINEMENT, cpu_ms=3_600_000), num_children=1, max_waiting=1, max_wait_s=3600)
    spinning = asyncio.create_task(ask(pool, "spin"))
    await wait_until(lambda: pool.num_started == 1, "a child spins")
    waiting = asyncio.create_task(ask(pool, "echo"))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):  # bounds a hang only
        with pytest.raises(OverloadedError):
            await ask(pool, "echo")
    assert (waiting.done(), pool.num_started) == (False, 1)
    waiting.cancel()
    await pool.close()
    await asyncio.wait([spinning, waiting])


async def test_none_waits_for_a_child_longer_than_it_may() -> None:
    pool = make_pool(replace(CONFINEMENT, cpu_ms=3_600_000), num_children=1, max_wait_s=0.05)
    spinning = asyncio.create_task(ask(pool, "spin"))
    await wait_until(lambda: pool.num_started == 1, "a child spins")
    async with asyncio.timeout(60):  # bounds a hang only
        with pytest.raises(OverloadedError):
            await ask(pool, "echo")
    await pool.close()
    await asyncio.wait([spinning])


async def test_a_child_cannot_write_files_dump_its_memory_or_raise_its_limits(pool: ConfinedPool) -> None:
    limits = json.loads(await ask(pool, "limits RLIMIT_CORE RLIMIT_FSIZE RLIMIT_NOFILE RLIMIT_AS"))
    assert limits.pop("RLIMIT_CORE") == limits.pop("RLIMIT_FSIZE") == [0, 0]
    assert limits.pop("RLIMIT_NOFILE") == [MAX_OPEN_FILES, MAX_OPEN_FILES]
    [address_space] = limits.values()
    assert address_space[0] == address_space[1] > MEMORY_BYTES


async def test_a_child_inherits_nothing_of_its_parent(pool: ConfinedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVRELAY_REDIS_PASSWORD", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    readable, writable = os.pipe()
    os.set_inheritable(readable, True)
    try:
        inherited = json.loads(await ask(pool, "inherited"))
    finally:
        os.close(readable)
        os.close(writable)
    assert set(inherited["variables"]) <= {"LC_CTYPE", "LD_LIBRARY_PATH", "TZ", "__CF_USER_TEXT_ENCODING"}
    kinds = {number: target.partition(":")[0] for number, target in inherited["descriptors"].items()}
    assert kinds == {"0": "/dev/null", "1": "/dev/null", "2": "/dev/null", "3": "socket"}
    assert inherited["flags"] == [1, 1, 1]
    assert (inherited["folder"], inherited["niceness"]) == ("/", os.nice(0) + CONFINEMENT.niceness)


async def test_what_a_library_prints_does_not_reach_the_parent(pool: ConfinedPool) -> None:
    for number in (1, 2):
        assert await ask(pool, f"write {number}") == b""
    assert await ask(pool, "echo whole") == b"whole"


async def test_a_child_that_keeps_memory_is_replaced_before_it_reaches_its_limit(pool: ConfinedPool) -> None:
    for _ in range(20):  # together more than a child may have
        assert await ask(pool, f"keep {MEMORY_BYTES // 8}") == b""
    assert sum(pool.num_killed.values()) == 0
    assert pool.num_started > 1


async def test_a_child_that_died_idle_fails_no_request(pool: ConfinedPool) -> None:
    await ask(pool, "echo")
    [pid] = pool.pids
    os.kill(pid, signal.SIGKILL)
    await wait_until(
        lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, "the child is gone"
    )
    assert await ask(pool, "echo more") == b"more"
    assert sum(pool.num_killed.values()) == 0


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_caller_that_is_gone_leaves_its_child_to_others(pool: ConfinedPool) -> None:
    await ask(pool, "echo")
    pids = pool.pids
    asking = asyncio.create_task(ask(pool, "sleep 0.05"))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    assert [await ask(pool, f"echo {number}") for number in range(3)] == [b"0", b"1", b"2"]
    assert pids[0] in pool.pids


async def test_a_child_is_started_ahead_once(pool: ConfinedPool) -> None:
    pool.prestart()
    pool.prestart()
    await wait_until(lambda: len(pool.pids) == 1, "a child is ready")
    pool.prestart()
    assert await ask(pool, "echo") == b""
    assert pool.num_started == 1


async def test_a_request_waits_for_the_child_that_is_being_started(pool: ConfinedPool) -> None:
    pool.prestart()
    assert await ask(pool, "echo") == b""
    assert pool.num_started == 1


async def test_where_no_child_can_be_started_requests_are_told_so() -> None:
    pool = make_pool(replace(CONFINEMENT, module="tests.support.no_such_module"))
    pool.prestart()
    for _ in range(3):  # more than there are places
        with pytest.raises(UnavailableError, match="the obedience of tests needs a process"):
            await ask(pool, "echo")
    await pool.close()
    with pytest.raises(UnavailableError, match="has stopped"):
        await ask(pool, "echo")


PARENT = """
import asyncio, os
from tests.runtime.test_confined_pool import CONFINEMENT, ask, make_pool
async def main():
    idle, busy = make_pool(), make_pool()
    await ask(idle, "echo")
    await ask(busy, "echo")
    sleeping = asyncio.create_task(ask(busy, "sleep 300"))
    for _ in range(50):  # the request is on its way, so that the child does not look at its parent
        await asyncio.sleep(0)
    print(*idle.pids, *busy.pids, flush=True)
    os._exit(0)
asyncio.run(main())
"""


async def test_children_die_with_their_parent() -> None:
    parent = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", PARENT], capture_output=True, text=True, check=True, timeout=120
    )
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    await wait_until(lambda: not any(map(is_running, pids)), "the children are gone")
