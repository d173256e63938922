"""Compiles forms off the event loop, few at a time and for a bounded time, and keeps the last results.

A thread cannot be stopped: one that takes too long is no longer waited for, but counts among the few until it has ended. Knows
nothing of what the results are.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Generic, TypeVar

from kvrelay.deep_stack import start_on_deep_stack
from kvrelay.errors import InvalidRequestError, OverloadedError
from kvrelay.response_format import ResponseFormat
from kvrelay.result_cache import ResultCache

ResultT = TypeVar("ResultT")

MAX_KEPT = 64
NUM_THREADS = 2
MAX_WAITING = 64
TIMEOUT_MS = 10_000
RETRY_AFTER_MS = 1000


class FormCompiler(Generic[ResultT]):
    """Used on one event loop.

    Args:
        compile_form: called in a thread with a deep stack; may raise KvrelayError.
        max_kept: most results kept.
        num_threads: most forms compiled at a time.
        max_waiting: most forms that are compiled or wait for it.
        timeout_ms: longest time for a form, its turn included.
    """

    def __init__(
        self,
        compile_form: Callable[[ResponseFormat], ResultT],
        *,
        max_kept: int = MAX_KEPT,
        num_threads: int = NUM_THREADS,
        max_waiting: int = MAX_WAITING,
        timeout_ms: int = TIMEOUT_MS,
    ) -> None:
        self._compile_form = compile_form
        self._max_waiting = max_waiting
        self._timeout_ms = timeout_ms
        self._turns = asyncio.Semaphore(num_threads)
        self._results: ResultCache[ResponseFormat, ResultT] = ResultCache(self._compile, max_kept, "compile of a form")

    @property
    def num_kept(self) -> int:
        return self._results.num_kept

    async def get(self, form: ResponseFormat) -> ResultT:
        """The compiled form.

        Raises:
            InvalidRequestError: it cannot be compiled, or takes too long.
            OverloadedError: too many others are compiled now.
        """
        if form not in self._results and self._results.num_running >= self._max_waiting:
            raise _overloaded()
        return await self._results.get(form)

    async def _compile(self, form: ResponseFormat) -> ResultT:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._timeout_ms / 1000
        try:
            async with asyncio.timeout_at(give_up_at):
                await self._turns.acquire()
        except TimeoutError:
            raise _overloaded() from None
        outcome: asyncio.Future[ResultT] = loop.create_future()

        def run() -> None:
            done: concurrent.futures.Future[ResultT] = concurrent.futures.Future()
            try:
                done.set_result(self._compile_form(form))
            except Exception as error:  # the top of a thread: whoever waits is told
                done.set_exception(error)
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._note_ended, outcome, done)

        start_on_deep_stack(run, "compile of a form")
        try:
            async with asyncio.timeout_at(give_up_at):
                return await outcome
        except TimeoutError:
            problem = f"takes longer than {self._timeout_ms / 1000:g} s to compile; make it simpler"
            raise InvalidRequestError(form.field, problem) from None

    def _note_ended(self, outcome: "asyncio.Future[ResultT]", done: "concurrent.futures.Future[ResultT]") -> None:
        self._turns.release()
        if outcome.done():  # nobody waits any more
            return
        failure = done.exception()
        if failure is None:
            outcome.set_result(done.result())
        else:
            outcome.set_exception(failure)


def _overloaded() -> OverloadedError:
    return OverloadedError("too many different response formats are compiled now; try again in a moment", RETRY_AFTER_MS)
