"""Writes requests' journals into the store, behind the streams. When Redis is away it keeps them, bounded, and catches up.

Nothing waits for it, and none of its failures ends a request, but one: when another gateway has taken a request over, the one
that runs here must fall silent.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from gateway.request_journal import RequestJournal
from kvrelay.errors import StateLostError, StoreFullError, SupersededError, UnavailableError
from kvrelay.request_state import is_terminal
from kvrelay.state_store import StateStore

PASS_INTERVAL_S = 0.02
"""Least time for a pass over all requests."""
REST_FACTOR = 19.0
"""The writer rests so many times as long as it wrote: it has a twentieth of the loop, streams have the rest."""
MAX_PASS_INTERVAL_S = 1.0
REQUESTS_PER_PORTION = 2
"""It rests after so many: what it takes in one go is what tokens wait for."""
FULL_INTERVAL_S = 1.0
MAX_PARALLEL_WRITES = 8
MAX_ENDED_JOURNALS = 2048
MAX_ENDED_FRAMES = 100_000

_log = structlog.get_logger(__name__)


class StateWriter:
    """The gateway's one background writer.

    Args:
        store: where to write.
        on_superseded: called with the id of a request that goes on elsewhere; must not raise.
    """

    def __init__(self, store: StateStore, on_superseded: Callable[[str], None]) -> None:
        self._store = store
        self._on_superseded = on_superseded
        self._journals: dict[str, RequestJournal] = {}
        self._urgent: set[str] = set()
        self._pass: deque[str] = deque()
        """Requests that the current pass has not come to."""
        self._num_portions = 1
        self._full = False
        self._woken = asyncio.Event()
        self.num_dropped = 0
        """Ended requests whose last state was never written, for Redis was away too long."""

    def check_room(self) -> None:
        """Raises StoreFullError while Redis is out of memory."""
        if self._full:
            raise StoreFullError("the state store is out of memory; try again later, or give Redis more")

    def track(self, journal: RequestJournal) -> None:
        """Writes the journal until it has ended and everything of it is written."""
        self._journals[journal.request_id] = journal
        self._drop_surplus()
        self.write_soon(journal)

    def write_soon(self, journal: RequestJournal) -> None:
        """Something happened that other gateways should know at once: the request began or ended."""
        self._urgent.add(journal.request_id)
        self._woken.set()

    def _drop_surplus(self) -> None:
        """Bounds what is kept while Redis is away. Running requests are bounded by admission."""
        ended = [journal for journal in self._journals.values() if journal.ended]
        num_frames = sum(len(journal.output.frames) for journal in ended)
        while len(ended) > MAX_ENDED_JOURNALS or num_frames > MAX_ENDED_FRAMES:
            journal = ended.pop(0)
            num_frames -= len(journal.output.frames)
            del self._journals[journal.request_id]
            self.num_dropped += 1
            if self.num_dropped & (self.num_dropped - 1) == 0:
                _log.warning("redis is away for long: states of ended requests are dropped", num_dropped=self.num_dropped)

    async def run(self) -> None:
        """Writes for ever; cancel it to stop."""
        loop = asyncio.get_running_loop()
        next_portion = loop.time()
        while True:
            await self._store.health.wait_until_healthy()
            self._woken.clear()
            await self._write_urgent()
            if loop.time() >= next_portion:
                rest_s = await self._write_portion()
                next_portion = loop.time() + rest_s
            if self._full:
                await asyncio.sleep(FULL_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_portion):
                    await self._woken.wait()

    async def drain(self, timeout_s: float) -> None:
        """Writes what is left when the gateway ends, for so long at the most."""
        try:
            async with asyncio.timeout(timeout_s):
                while dirty := [request_id for request_id, journal in self._journals.items() if journal.dirty]:
                    await self._store.health.wait_until_healthy()
                    await self._write_journals(dirty)
                    await asyncio.sleep(PASS_INTERVAL_S)  # what was not written just now is not written at once either
        except TimeoutError:
            _log.warning("not all states were written at the end", num_left=len(self._journals))

    async def _write_portion(self) -> float:
        """Writes the next few requests of a pass over all that lack something; for how many seconds to rest then."""
        loop = asyncio.get_running_loop()
        if not self._pass:
            self._begin_pass()
        request_ids = [self._pass.popleft() for _ in range(min(REQUESTS_PER_PORTION, len(self._pass)))]
        begin = loop.time()
        await self._write_journals(request_ids)
        rest_s = REST_FACTOR * (loop.time() - begin)
        return min(max(rest_s, PASS_INTERVAL_S / self._num_portions), MAX_PASS_INTERVAL_S / self._num_portions)

    def _begin_pass(self) -> None:
        dirty = [request_id for request_id, journal in self._journals.items() if journal.dirty]
        self._full = False if not dirty else self._full
        self._pass.extend(dirty)
        self._num_portions = max(math.ceil(len(dirty) / REQUESTS_PER_PORTION), 1)

    async def _write_urgent(self) -> None:
        """Writes the requests that began or ended; the tokens of others can wait."""
        urgent, self._urgent = self._urgent, set()
        self._urgent.update(await self._write_journals(list(urgent)))

    async def _write_journals(self, request_ids: Sequence[str]) -> Sequence[str]:
        """Writes those that are known still; which it did not come to, for the store went away."""
        for begin in range(0, len(request_ids), MAX_PARALLEL_WRITES):
            some = request_ids[begin : begin + MAX_PARALLEL_WRITES]
            journals = [self._journals[request_id] for request_id in some if request_id in self._journals]
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
        except StoreFullError:
            self._full = True
        except UnavailableError:
            return  # it stays dirty
        except SupersededError:
            self._give_up(journal)
        except Exception:
            _log.exception("a request's state cannot be written", **journal.log_fields)
            self._forget(journal)

    async def _write_all(self, journal: RequestJournal) -> None:
        if not journal.created:
            if not await self._store.create(journal.record_to_create()):
                raise SupersededError("the id is taken")
            journal.created = True
        await self._write_moves(journal)
        while frames := journal.next_frames():
            position, attempt = journal.num_written_frames, journal.record.attempt
            num_tokens = journal.output.num_output_tokens
            await self._store.append_frames(journal.request_id, attempt, position, frames, num_tokens)
            journal.num_written_frames = position + len(frames)
            await self._write_moves(journal)
        if journal.terminal is not None:
            end = journal.terminal
            if not await self._store.transition(journal.request_id, end.attempt, end.state, fields=end.fields):
                raise SupersededError("the request goes on elsewhere")
            self._forget(journal)

    async def _write_moves(self, journal: RequestJournal) -> None:
        while journal.moves:
            move = journal.moves[0]
            new_attempt = move.attempt if move.attempt != move.from_attempt else None
            if not await self._store.transition(
                journal.request_id, move.from_attempt, move.state, new_attempt=new_attempt, fields=move.fields
            ):
                raise SupersededError("the request goes on elsewhere")
            if journal.moves and journal.moves[0] is move:
                journal.moves.popleft()

    async def _restore(self, journal: RequestJournal) -> None:
        record, frames = journal.record_to_restore(), journal.all_frames()
        if not await self._store.restore(record, frames):
            raise SupersededError("the request goes on elsewhere")
        journal.created = True
        _log.info("restored a request that redis had lost", **journal.log_fields)
        journal.num_written_frames = len(frames)
        if is_terminal(record.state):
            self._forget(journal)

    def _give_up(self, journal: RequestJournal) -> None:
        self._forget(journal)
        if not journal.ended:
            self._on_superseded(journal.request_id)

    def _forget(self, journal: RequestJournal) -> None:
        if self._journals.get(journal.request_id) is journal:
            del self._journals[journal.request_id]
