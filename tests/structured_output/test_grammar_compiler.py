"""The compiler of response formats: one compile for all who ask, few at a time, bounded in number
and in time, the last results kept.
"""

import asyncio
import threading
from collections import Counter

import pytest

from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError, OverloadedError
from kvrelay.structured_output.grammar_compiler import GrammarCompiler
from kvrelay.testing.waiting import wait_until

BOUND_S = 30.0


def response_format(name: str) -> ResponseFormat:
    return ResponseFormat.regex(name)


async def takes_all(asked: ResponseFormat) -> int:
    """A check that refuses nothing. A name ends with its size."""
    return int(asked.source.rpartition(":")[2] or 0) if ":" in asked.source else 1


class Compile:
    """Stands for a compile that takes until it is let go on; counts calls by the response format's
    source.
    """

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
    compile_grammar = Compile()
    compiler = GrammarCompiler(compile_grammar, takes_all, max_kept=2)
    for name in ("a", "b", "a", "c", "a", "b"):  # c pushes b out, for a was used since
        assert await compiler.get(response_format(name)) == name.upper()
    assert compile_grammar.calls == {"a": 1, "b": 2, "c": 1}
    assert compiler.num_kept == 2


async def test_grammars_are_bounded_by_bytes_too_and_the_one_unused_for_longest_is_dropped() -> None:
    compile_grammar = Compile()
    compiler = GrammarCompiler(compile_grammar, takes_all, max_kept_bytes=100)
    for name in ("a:40", "b:40", "a:40", "c:30"):  # b was unused for longest
        await compiler.get(response_format(name))
    assert (compiler.num_kept, compiler.num_kept_bytes) == (2, 70)
    assert response_format("b:40") not in compiler
    for number in range(50):
        await compiler.get(response_format(f"{number}:17"))
        assert compiler.num_kept_bytes <= 100
    assert compiler.num_kept == 5


async def test_a_grammar_above_the_bound_is_given_and_not_kept() -> None:
    compile_grammar = Compile()
    compiler = GrammarCompiler(compile_grammar, takes_all, max_kept_bytes=100)
    for _ in range(2):
        assert await compiler.get(response_format("a:101")) == "A:101"
    assert compile_grammar.calls == {"a:101": 2}
    assert (compiler.num_kept, compiler.num_kept_bytes) == (0, 0)


async def test_all_who_ask_for_a_form_wait_for_one_compile() -> None:
    compile_grammar = Compile(waits=True)
    compiler = GrammarCompiler(compile_grammar, takes_all)
    asking = [asyncio.create_task(compiler.get(response_format("a"))) for _ in range(5)]
    await wait_until(lambda: compile_grammar.running == 1, "the compile begins")
    compile_grammar.go_on.set()
    assert await asyncio.gather(*asking) == ["A"] * 5
    assert compile_grammar.calls["a"] == 1


async def test_one_who_no_longer_waits_takes_nothing_from_the_others() -> None:
    compile_grammar = Compile(waits=True)
    compiler = GrammarCompiler(compile_grammar, takes_all)
    first, second = (asyncio.create_task(compiler.get(response_format("a"))) for _ in range(2))
    await wait_until(lambda: compile_grammar.running == 1, "the compile begins")
    first.cancel()
    await asyncio.wait([first])
    compile_grammar.go_on.set()
    assert await second == "A"


async def test_few_are_compiled_at_a_time() -> None:
    compile_grammar = Compile(waits=True)
    compiler = GrammarCompiler(compile_grammar, takes_all, num_threads=2)
    asking = [asyncio.create_task(compiler.get(response_format(str(number)))) for number in range(6)]
    await wait_until(lambda: compile_grammar.running == 2, "two compile")
    compile_grammar.go_on.set()
    assert await asyncio.gather(*asking) == [str(number) for number in range(6)]
    assert compile_grammar.most_running == 2


async def test_too_many_that_wait_are_refused_and_told_to_come_again() -> None:
    compile_grammar = Compile(waits=True)
    compiler = GrammarCompiler(compile_grammar, takes_all, num_threads=1, max_waiting=2)
    asking = [asyncio.create_task(compiler.get(response_format(name))) for name in ("a", "b")]
    await wait_until(lambda: compile_grammar.running == 1, "the first compiles")
    with pytest.raises(OverloadedError) as refused:
        await compiler.get(response_format("c"))
    assert refused.value.retry_after_ms
    joined = asyncio.create_task(compiler.get(response_format("a")))  # takes no place of its own
    compile_grammar.go_on.set()
    assert await asyncio.gather(*asking, joined) == ["A", "B", "A"]
    assert await compiler.get(response_format("c")) == "C"


async def test_a_form_that_takes_too_long_is_refused_and_keeps_its_place_until_its_thread_has_ended() -> None:
    compile_grammar = Compile(waits=True)
    compiler = GrammarCompiler(compile_grammar, takes_all, num_threads=1, timeout_ms=50)
    with pytest.raises(InvalidRequestError, match=r"response_format\.regex takes longer than 0\.05 s"):
        await compiler.get(response_format("slow"))
    with pytest.raises(OverloadedError):  # its turn never comes
        await compiler.get(response_format("behind"))
    assert compile_grammar.calls == {"slow": 1}
    compile_grammar.go_on.set()
    await wait_until(lambda: compile_grammar.running == 0, "the thread ends")

    async def is_compiled() -> bool:
        try:
            return await compiler.get(response_format("behind")) == "BEHIND"
        except (InvalidRequestError, OverloadedError):
            return False  # a busy machine takes longer than this compiler waits

    await wait_until(is_compiled, "its turn comes")


async def test_a_failure_is_told_to_all_and_not_kept() -> None:
    compile_grammar = Compile(waits=True)
    compiler = GrammarCompiler(compile_grammar, takes_all)
    asking = [asyncio.create_task(compiler.get(response_format("wrong"))) for _ in range(2)]
    await wait_until(lambda: compile_grammar.running == 1, "the compile begins")
    compile_grammar.go_on.set()
    failures = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(failure) for failure in failures] == [InvalidRequestError] * 2
    with pytest.raises(InvalidRequestError):
        await compiler.get(response_format("wrong"))
    assert (compile_grammar.calls["wrong"], compiler.num_kept) == (2, 0)


async def test_no_thread_begins_with_a_format_that_its_check_refuses() -> None:
    async def refuse(asked: ResponseFormat) -> int:
        raise InvalidRequestError(asked.field, "takes too much")

    compile_grammar = Compile()
    compiler = GrammarCompiler(compile_grammar, refuse)
    with pytest.raises(InvalidRequestError, match="takes too much"):
        await compiler.get(response_format("a"))
    assert (compile_grammar.calls, compiler.num_kept) == ({}, 0)
