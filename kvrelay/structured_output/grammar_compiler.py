"""Compiles response formats in threads, few at a time.

A thread cannot be stopped: after its timeout it still counts until it ends. So each format passes
a check first, in a process that can be killed.
"""

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError, OverloadedError
from kvrelay.runtime.event_loop import call_soon
from kvrelay.runtime.large_stack import start_with_large_stack
from kvrelay.runtime.single_flight_cache import SingleFlightCache

ResultT = TypeVar("ResultT")

MAX_KEPT = 64
MAX_KEPT_MIB = 64
NUM_THREADS = 2
MAX_WAITING = 64
TIMEOUT_MS = 10_000
RETRY_AFTER_MS = 1000


@dataclass(frozen=True, slots=True)
class _Compiled(Generic[ResultT]):
    result: ResultT
    num_bytes: int


class GrammarCompiler(Generic[ResultT]):
    """Used on one event loop. Calls `compile_grammar` in threads with a large stack.

    `check` returns the size in bytes, and raises KvrelayError for what no thread may compile.
    """

    def __init__(
        self,
        compile_grammar: Callable[[ResponseFormat], ResultT],
        check: Callable[[ResponseFormat], Awaitable[int]],
        *,
        max_kept: int = MAX_KEPT,
        max_kept_bytes: int = MAX_KEPT_MIB << 20,
        num_threads: int = NUM_THREADS,
        max_waiting: int = MAX_WAITING,
        timeout_ms: int = TIMEOUT_MS,
    ) -> None:
        self._compile_grammar = compile_grammar
        self._check = check
        self._max_waiting = max_waiting
        self._timeout_ms = timeout_ms
        self._turns = asyncio.Semaphore(num_threads)
        self._results: SingleFlightCache[ResponseFormat, _Compiled[ResultT]] = SingleFlightCache(
            self._compile,
            max_kept,
            "compile of a response format",
            max_bytes=max_kept_bytes,
            size_of=lambda compiled: compiled.num_bytes,
        )

    @property
    def num_kept(self) -> int:
        return self._results.num_kept

    @property
    def num_kept_bytes(self) -> int:
        return self._results.num_bytes

    def __contains__(self, response_format: ResponseFormat) -> bool:
        return response_format in self._results

    async def get(self, response_format: ResponseFormat) -> ResultT:
        """Compiles a format, or returns it from the cache.

        Raises:
            InvalidRequestError: it cannot be compiled, or takes too long.
            OverloadedError: too many formats are being compiled.
        """
        if response_format not in self._results and self._results.num_running >= self._max_waiting:
            raise _overloaded()
        return (await self._results.get(response_format)).result

    async def _compile(self, response_format: ResponseFormat) -> "_Compiled[ResultT]":
        num_bytes = await self._check(response_format)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_ms / 1000
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.acquire()
        except TimeoutError:
            raise _overloaded() from None
        outcome: asyncio.Future[ResultT] = loop.create_future()

        def run() -> None:
            done: concurrent.futures.Future[ResultT] = concurrent.futures.Future()
            try:
                done.set_result(self._compile_grammar(response_format))
            except Exception as error:  # the callers get it
                done.set_exception(error)
            call_soon(loop, self._on_compiled, outcome, done)

        start_with_large_stack(run, "compile of a response format")
        try:
            async with asyncio.timeout_at(deadline):
                return _Compiled(await outcome, num_bytes)
        except TimeoutError:
            problem = f"takes longer than {self._timeout_ms / 1000:g} s to compile; make it simpler"
            raise InvalidRequestError(response_format.field, problem) from None

    def _on_compiled(self, outcome: "asyncio.Future[ResultT]", done: "concurrent.futures.Future[ResultT]") -> None:
        self._turns.release()
        if outcome.done():  # the caller has timed out
            return
        failure = done.exception()
        if failure is None:
            outcome.set_result(done.result())
        else:
            outcome.set_exception(failure)


def _overloaded() -> OverloadedError:
    return OverloadedError(
        "too many different response formats are compiled now; try again in a moment", RETRY_AFTER_MS
    )
