"""The loop that processes serve on: uvloop's with asyncio's clock, or asyncio's own."""

import asyncio
import sys
import time

import pytest

from kvrelay.runtime import event_loop
from tests.support import left_out


async def loop_and_whether_its_clock_is_monotonic() -> tuple[asyncio.AbstractEventLoop, bool]:
    loop = asyncio.get_running_loop()
    time.sleep(0.01)  # noqa: ASYNC251  # a loop that looks at the clock once a turn does not notice
    return loop, time.monotonic() <= loop.time() <= time.monotonic()


def test_it_is_uvloops_with_the_clock_that_deadlines_are_on() -> None:
    uvloop = pytest.importorskip("uvloop", reason=left_out.needs("uvloop", "make install"))
    loop, is_monotonic = event_loop.run(loop_and_whether_its_clock_is_monotonic())
    assert isinstance(loop, uvloop.Loop)
    assert is_monotonic


def test_it_is_asyncios_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loop, is_monotonic = event_loop.run(loop_and_whether_its_clock_is_monotonic())
    assert is_monotonic
    assert type(loop).__module__.startswith("asyncio.")


def test_what_main_raises_comes_out() -> None:
    async def main() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        event_loop.run(main())
