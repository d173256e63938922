"""Writes requests' journals into the store, behind the streams.

    urgent   requests that began or ended     written at once
    sweep    all requests that lack a write   in batches, with a pause after each

It ends a request here only when another gateway took it over.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from gateway.state.journal import RequestJournal
from gateway.streaming.frames import MAX_ENDED_FRAMES
from kvrelay.core.backoff import Backoff
from kvrelay.core.request_state import is_terminal
from kvrelay.errors import StateLostError, StoreFullError, SupersededError, UnavailableError
from kvrelay.state.state_store import StateStore

SWEEP_INTERVAL_S = 0.1
"""Least time for a whole sweep."""
MAX_SWEEP_INTERVAL_S = 1.0
PAUSE_FACTOR = 19.0
"""Pause per time of a write: the writer uses at most 1/20 of the loop."""
REQUESTS_PER_BATCH = 2
"""Tokens wait for one batch, so it stays small."""
FULL_INTERVAL_S = 1.0
MAX_PARALLEL_WRITES = 8
MAX_ENDED_JOURNALS = 2048
MAX_TRIES_OF_ENDED = 10
"""With growing pauses, about a minute."""
FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 20.0

_log = structlog.get_logger(__name__)


class StateWriter:
    """`on_superseded` is told of a request that goes on elsewhere; must not raise."""

    def __init__(self, store: StateStore, on_superseded: Callable[[str], None]) -> None:
        self._store = store
        self._on_superseded = on_superseded
        self._journals: dict[str, RequestJournal] = {}
        self._urgent: set[str] = set()
        self._sweep: deque[str] = deque()
        """Requests that the current sweep has not come to."""
        self._num_batches = 1
        self._full = False
        self._failures = WriteFailures()
        self._woken = asyncio.Event()
        self.num_dropped = 0
        """Ended requests whose last state was never written."""

    def check_room(self) -> None:
        """Raises StoreFullError while Redis is out of memory."""
        if self._full:
            raise StoreFullError("the state store is out of memory; try again later, or give Redis more")

    def track(self, journal: RequestJournal) -> None:
        """Writes the journal until it has ended and is written."""
        self._journals[journal.request_id] = journal
        self._drop_surplus()
        self.write_soon(journal)

    def write_soon(self, journal: RequestJournal) -> None:
        """Other gateways need begins and ends at once."""
        self._urgent.add(journal.request_id)
        self._woken.set()

    def _drop_surplus(self) -> None:
        """Bounds ended journals; admission bounds running ones."""
        ended = [journal for journal in self._journals.values() if journal.ended]
        num_frames = sum(len(journal.output.frames) for journal in ended)
        while len(ended) > MAX_ENDED_JOURNALS or num_frames > MAX_ENDED_FRAMES:
            journal = ended.pop(0)
            num_frames -= len(journal.output.frames)
            self._forget(journal)
            self.num_dropped += 1
            if self.num_dropped & (self.num_dropped - 1) == 0:
                _log.warning(
                    "redis is away for long: states of ended requests are dropped", num_dropped=self.num_dropped
                )

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_batch = loop.time()
        while True:
            await self._store.health.wait_until_healthy()
            self._woken.clear()
            await self._write_urgent()
            if loop.time() >= next_batch:
                pause_s = await self._write_batch()
                next_batch = loop.time() + pause_s
            if self._full:
                await asyncio.sleep(FULL_INTERVAL_S)
            try:
                async with asyncio.timeout_at(next_batch):
                    await self._woken.wait()
            except TimeoutError:
                next_batch = 0.0  # due, although a timer may come a millisecond early

    async def drain(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while dirty := [request_id for request_id, journal in self._journals.items() if journal.dirty]:
                    await self._store.health.wait_until_healthy()
                    await self._write_journals(dirty)
                    # a write that just failed would fail again
                    await asyncio.sleep(SWEEP_INTERVAL_S)
        except TimeoutError:
            _log.warning("not all states were written at the end", num_left=len(self._journals))

    async def _write_batch(self) -> float:
        """Returns the pause in seconds."""
        loop = asyncio.get_running_loop()
        if not self._sweep:
            self._begin_sweep()
        request_ids = [self._sweep.popleft() for _ in range(min(REQUESTS_PER_BATCH, len(self._sweep)))]
        begin = loop.time()
        await self._write_journals(request_ids)
        pause_s = PAUSE_FACTOR * (loop.time() - begin)
        return min(max(pause_s, SWEEP_INTERVAL_S / self._num_batches), MAX_SWEEP_INTERVAL_S / self._num_batches)

    def _begin_sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        dirty = [
            request_id
            for request_id, journal in self._journals.items()
            if journal.dirty and self._failures.may_try(request_id, now)
        ]
        self._full = False if not dirty else self._full
        self._sweep.extend(dirty)
        self._num_batches = max(math.ceil(len(dirty) / REQUESTS_PER_BATCH), 1)

    async def _write_urgent(self) -> None:
        urgent, self._urgent = self._urgent, set()
        self._urgent.update(await self._write_journals(list(urgent)))

    async def _write_journals(self, request_ids: Sequence[str]) -> Sequence[str]:
        """Returns the requests that are left when the store goes away."""
        for begin in range(0, len(request_ids), MAX_PARALLEL_WRITES):
            some = request_ids[begin : begin + MAX_PARALLEL_WRITES]
            now = asyncio.get_running_loop().time()
            may_try = [each for each in some if each in self._journals and self._failures.may_try(each, now)]
            journals = [self._journals[request_id] for request_id in may_try]
            await asyncio.gather(*map(self._write, journals))
            if not self._store.healthy:
                return request_ids[begin + MAX_PARALLEL_WRITES :]
        return ()

    async def _write(self, journal: RequestJournal) -> None:
        try:
            try:
                await self._write_all(journal)
            except StateLostError:
                await self._restore(journal)
            self._full = False
            self._failures.forget(journal.request_id)
        except StoreFullError:
            self._full = True
        except UnavailableError:
            return  # it stays dirty
        except SupersededError:
            self._on_write_superseded(journal)
        except Exception:
            self._on_write_failed(journal)

    def _on_write_failed(self, journal: RequestJournal) -> None:
        """Drops only an ended request that failed often."""
        num_failures = self._failures.count(journal.request_id, journal.ended, asyncio.get_running_loop().time())
        if num_failures == 1:
            _log.exception("a request's state cannot be written; it is tried again", **journal.log_fields)
        if journal.ended and num_failures >= MAX_TRIES_OF_ENDED:
            self._forget(journal)
            self.num_dropped += 1
            _log.error("the state of an ended request is dropped", num_failures=num_failures, **journal.log_fields)

    async def _write_all(self, journal: RequestJournal) -> None:
        if not journal.created:
            if not await self._store.create(journal.record_to_create()):
                raise SupersededError("the id is taken")
            journal.created = True
        await self._write_transitions(journal)
        while journal.lacks_output:
            position, attempt = journal.num_written_frames, journal.record.attempt
            frames, num_tokens = journal.next_frames(), journal.output.num_output_tokens
            await self._store.append_frames(journal.request_id, attempt, position, frames, num_tokens)
            journal.on_written(position + len(frames), num_tokens)
            await self._write_transitions(journal)
        if journal.terminal is not None:
            end = journal.terminal
            if not await self._store.transition(journal.request_id, end.attempt, end.state, fields=end.fields):
                raise SupersededError("the request goes on elsewhere")
            self._forget(journal)

    async def _write_transitions(self, journal: RequestJournal) -> None:
        while journal.transitions:
            step = journal.transitions[0]
            new_attempt = step.attempt if step.attempt != step.from_attempt else None
            if not await self._store.transition(
                journal.request_id, step.from_attempt, step.state, new_attempt=new_attempt, fields=step.fields
            ):
                raise SupersededError("the request goes on elsewhere")
            if journal.transitions and journal.transitions[0] is step:
                journal.transitions.popleft()

    async def _restore(self, journal: RequestJournal) -> None:
        record, frames = journal.record_to_restore(), journal.all_frames()
        num_tokens = record.num_output_tokens
        if not await self._store.restore(record, frames):
            raise SupersededError("the request goes on elsewhere")
        journal.created = True
        _log.info("restored a request that redis had lost", **journal.log_fields)
        journal.on_written(len(frames), num_tokens)
        if is_terminal(record.state):
            self._forget(journal)

    def _on_write_superseded(self, journal: RequestJournal) -> None:
        self._forget(journal)
        if not journal.ended:
            self._on_superseded(journal.request_id)

    def _forget(self, journal: RequestJournal) -> None:
        if self._journals.get(journal.request_id) is journal:
            del self._journals[journal.request_id]
            self._failures.forget(journal.request_id)


@dataclass(slots=True)
class _Failures:
    is_ended: bool
    retry_at: float = 0.0
    num_failures: int = 0
    backoff: Backoff = field(default_factory=lambda: Backoff(FIRST_PAUSE_S, MAX_PAUSE_S, random.random))


class WriteFailures:
    """Each request's failures in a row. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._by_request: dict[str, _Failures] = {}

    def may_try(self, request_id: str, now: float) -> bool:
        failures = self._by_request.get(request_id)
        return failures is None or now >= failures.retry_at

    def count(self, request_id: str, is_ended: bool, now: float) -> int:
        failures = self._by_request.get(request_id)
        if failures is None or failures.is_ended != is_ended:
            failures = self._by_request[request_id] = _Failures(is_ended)
        failures.num_failures += 1
        failures.retry_at = now + failures.backoff.next_delay_s()
        return failures.num_failures

    def forget(self, request_id: str) -> None:
        self._by_request.pop(request_id, None)
