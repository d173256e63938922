"""The engine thread: goes on after what fails, and says so when it cannot."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvrelay.worker.engine_thread import EngineThread

WAIT_S = 30.0


class ScriptedLoop:
    """Commands are words; "bad" raises."""

    def __init__(self, *, fail_all_jobs: bool = True) -> None:
        self.handled: list[str] = []
        self.num_fail_all = 0
        self.last_came = threading.Event()
        self._fail_all_jobs = fail_all_jobs

    def handle(self, command: str) -> None:
        if command == "bad":
            raise ValueError
        self.handled.append(command)
        if command == "last":
            self.last_came.set()

    def step(self) -> bool:
        return False

    def fail_all(self) -> None:
        self.num_fail_all += 1
        if not self._fail_all_jobs:
            raise ValueError


@contextmanager
def filled_thread(loop: ScriptedLoop, commands: list[str], broken: threading.Event | None = None) -> Iterator[None]:
    """All commands are in the inbox before the thread takes the first."""
    thread = EngineThread("test engine", loop, on_broken=(broken or threading.Event()).set)
    for command in commands:
        thread.submit(command)
    thread.start()
    try:
        yield
    finally:
        thread.stop()


def test_commands_behind_one_that_fails_are_not_lost() -> None:
    loop = ScriptedLoop()
    with filled_thread(loop, ["first", "bad", "last"]):
        assert loop.last_came.wait(WAIT_S)
    assert loop.handled == ["first", "last"]
    assert loop.num_fail_all == 1


def test_a_thread_that_cannot_even_fail_its_job_says_so() -> None:
    broken = threading.Event()
    with filled_thread(ScriptedLoop(fail_all_jobs=False), ["bad"], broken):
        assert broken.wait(WAIT_S)


def test_a_full_inbox_refuses_new_jobs_and_takes_everything_else() -> None:
    thread = EngineThread("test engine", ScriptedLoop(), max_commands=1)
    assert thread.submit_job("first")
    assert not thread.submit_job("second")
    thread.submit("cancel")


class HangingLoop(ScriptedLoop):
    """Its steps do not end before they are let."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.let = threading.Event()

    def step(self) -> bool:
        self.begun.set()
        self.let.wait(WAIT_S)
        return False


def test_a_step_that_hangs_shows_and_a_thread_at_rest_does_not_seem_to_hang() -> None:
    loop = HangingLoop()
    thread = EngineThread("test engine", loop)
    assert thread.turn_s == 0
    thread.start()
    try:
        assert loop.begun.wait(WAIT_S)
        first = thread.turn_s
        while thread.turn_s <= first:
            pass
    finally:
        loop.let.set()
        thread.stop()
    assert thread.turn_s == 0
