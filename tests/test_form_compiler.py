"""The compiler of forms: one compile for all who ask, few at a time, bounded in number and in time, the last results kept."""

import asyncio
import threading
from collections import Counter

import pytest

from kvrelay.errors import InvalidRequestError, OverloadedError
from kvrelay.form_compiler import FormCompiler
from kvrelay.response_format import ResponseFormat
from kvrelay.testing.waiting import wait_until

BOUND_S = 10.0


def form(name: str) -> ResponseFormat:
    return ResponseFormat.regex(name)


class Compile:
    """Stands for a compile that takes until it is let go on; counts calls by the form's source."""

    def __init__(self, *, waits: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.running = 0
        self.most_running = 0
        self.go_on = threading.Event()
        self._lock = threading.Lock()
        if not waits:
            self.go_on.set()

    def __call__(self, asked: ResponseFormat) -> str:
        with self._lock:
            self.calls[asked.source] += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            assert self.go_on.wait(BOUND_S)
            if asked.source.startswith("wrong"):
                raise InvalidRequestError(asked.field, "is wrong")
            return asked.source.upper()
        finally:
            with self._lock:
                self.running -= 1


async def test_the_last_forms_are_kept_and_the_one_unused_for_longest_is_dropped() -> None:
    compile_form = Compile()
    compiler = FormCompiler(compile_form, max_kept=2)
    for name in ("a", "b", "a", "c", "a", "b"):  # c pushes b out, for a was used since
        assert await compiler.get(form(name)) == name.upper()
    assert compile_form.calls == {"a": 1, "b": 2, "c": 1}
    assert compiler.num_kept == 2


async def test_all_who_ask_for_a_form_wait_for_one_compile() -> None:
    compile_form = Compile(waits=True)
    compiler = FormCompiler(compile_form)
    asking = [asyncio.create_task(compiler.get(form("a"))) for _ in range(5)]
    await wait_until(lambda: compile_form.running == 1, "the compile begins")
    compile_form.go_on.set()
    assert await asyncio.gather(*asking) == ["A"] * 5
    assert compile_form.calls["a"] == 1


async def test_one_who_no_longer_waits_takes_nothing_from_the_others() -> None:
    compile_form = Compile(waits=True)
    compiler = FormCompiler(compile_form)
    first, second = (asyncio.create_task(compiler.get(form("a"))) for _ in range(2))
    await wait_until(lambda: compile_form.running == 1, "the compile begins")
    first.cancel()
    await asyncio.wait([first])
    compile_form.go_on.set()
    assert await second == "A"


async def test_few_are_compiled_at_a_time() -> None:
    compile_form = Compile(waits=True)
    compiler = FormCompiler(compile_form, num_threads=2)
    asking = [asyncio.create_task(compiler.get(form(str(number)))) for number in range(6)]
    await wait_until(lambda: compile_form.running == 2, "two compile")
    compile_form.go_on.set()
    assert await asyncio.gather(*asking) == [str(number) for number in range(6)]
    assert compile_form.most_running == 2


async def test_too_many_that_wait_are_refused_and_told_to_come_again() -> None:
    compile_form = Compile(waits=True)
    compiler = FormCompiler(compile_form, num_threads=1, max_waiting=2)
    asking = [asyncio.create_task(compiler.get(form(name))) for name in ("a", "b")]
    await wait_until(lambda: compile_form.running == 1, "the first compiles")
    with pytest.raises(OverloadedError) as refused:
        await compiler.get(form("c"))
    assert refused.value.retry_after_ms
    joined = asyncio.create_task(compiler.get(form("a")))  # takes no place of its own
    compile_form.go_on.set()
    assert await asyncio.gather(*asking, joined) == ["A", "B", "A"]
    assert await compiler.get(form("c")) == "C"


async def test_a_form_that_takes_too_long_is_refused_and_keeps_its_place_until_its_thread_has_ended() -> None:
    compile_form = Compile(waits=True)
    compiler = FormCompiler(compile_form, num_threads=1, timeout_ms=50)
    with pytest.raises(InvalidRequestError, match=r"response_format\.regex takes longer than 0\.05 s"):
        await compiler.get(form("slow"))
    with pytest.raises(OverloadedError):  # its turn never comes
        await compiler.get(form("behind"))
    assert compile_form.calls == {"slow": 1}
    compile_form.go_on.set()
    await wait_until(lambda: compile_form.running == 0, "the thread ends")
    assert await compiler.get(form("behind")) == "BEHIND"


async def test_a_failure_is_told_to_all_and_not_kept() -> None:
    compile_form = Compile(waits=True)
    compiler = FormCompiler(compile_form)
    asking = [asyncio.create_task(compiler.get(form("wrong"))) for _ in range(2)]
    await wait_until(lambda: compile_form.running == 1, "the compile begins")
    compile_form.go_on.set()
    failures = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(failure) for failure in failures] == [InvalidRequestError] * 2
    with pytest.raises(InvalidRequestError):
        await compiler.get(form("wrong"))
    assert (compile_form.calls["wrong"], compiler.num_kept) == (2, 0)
