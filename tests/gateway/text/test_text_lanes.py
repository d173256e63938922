"""Text lanes: bounded threads, queues and waiting times."""

import asyncio
import threading

import pytest

from gateway.text.text_lanes import INLINE_BYTES, NUM_LONG_THREADS, SHORT_BYTES, TextLanes
from kvrelay.errors import DeadlineError, OverloadedError

LONG = SHORT_BYTES + 1
BOUND_S = 30.0


def soon() -> float:
    """A deadline that no test reaches."""
    return asyncio.get_running_loop().time() + BOUND_S


class Held:
    """Blocks its thread until `go_on` is set."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.go_on.wait(BOUND_S)
        return "held"


async def start(lanes: TextLanes, held: Held) -> "asyncio.Task[str]":
    task = asyncio.create_task(lanes.run(LONG, soon(), held))
    assert await asyncio.to_thread(held.began.wait, BOUND_S)
    return task


async def waiting(task: "asyncio.Task[object]") -> None:
    """Runs the loop until the task waits."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()


async def test_a_very_short_text_runs_on_the_event_loop() -> None:
    thread = await TextLanes().run(INLINE_BYTES, soon(), threading.current_thread)
    assert thread is threading.current_thread()


async def test_long_texts_delay_only_each_other() -> None:
    lanes, held = TextLanes(), [Held() for _ in range(NUM_LONG_THREADS + 1)]
    tasks = [await start(lanes, one) for one in held[:NUM_LONG_THREADS]]
    last = asyncio.create_task(lanes.run(LONG, soon(), held[-1]))
    await waiting(last)
    assert await lanes.run(SHORT_BYTES, soon(), lambda: "short") == "short"
    assert not held[-1].began.is_set()
    for one in held:
        one.go_on.set()
    assert await asyncio.gather(*tasks, last) == ["held"] * len(held)


async def test_a_full_queue_refuses_texts_with_a_retry_time() -> None:
    lanes, held = TextLanes(max_long_waiting=1), Held()
    first = await start(lanes, held)
    second = asyncio.create_task(lanes.run(LONG, soon(), lambda: "second"))
    await waiting(second)
    with pytest.raises(OverloadedError) as refusal:
        await lanes.run(LONG, soon(), lambda: "third")
    assert refusal.value.retry_after_ms > 0
    held.go_on.set()
    assert tuple(await asyncio.gather(first, second)) == ("held", "second")


async def test_a_cancelled_caller_frees_its_place() -> None:
    lanes, held = TextLanes(max_long_waiting=1), Held()
    first = await start(lanes, held)
    gone = asyncio.create_task(lanes.run(LONG, soon(), lambda: pytest.fail("its caller is gone")))
    await waiting(gone)
    gone.cancel()
    await asyncio.wait([gone])
    second = asyncio.create_task(lanes.run(LONG, soon(), lambda: "second"))
    held.go_on.set()
    assert tuple(await asyncio.gather(first, second)) == ("held", "second")


async def test_an_abandoned_function_keeps_its_turn_until_it_ends() -> None:
    lanes, held = TextLanes(), Held()
    first = await start(lanes, held)
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(lanes.run(LONG, soon(), lambda: "second"))
    await waiting(second)
    held.go_on.set()
    assert await second == "second"


async def test_a_deadline_ends_the_wait_and_frees_the_turn() -> None:
    lanes, held = TextLanes(), Held()
    with pytest.raises(DeadlineError):
        await lanes.run(LONG, asyncio.get_running_loop().time(), held)
    with pytest.raises(DeadlineError):  # its turn is taken, or not yet
        await lanes.run(LONG, asyncio.get_running_loop().time(), held)
    held.go_on.set()
    assert await lanes.run(LONG, soon(), lambda: "next") == "next"


async def test_a_failure_reaches_the_caller_and_frees_the_turn() -> None:
    def fail() -> None:
        raise ValueError("broken")

    lanes = TextLanes()
    for _ in range(NUM_LONG_THREADS + 1):
        with pytest.raises(ValueError, match="broken"):
            await lanes.run(LONG, soon(), fail)
