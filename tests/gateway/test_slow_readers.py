"""A client that reads too slowly: its sequence pauses, goes on when it has caught up, and ends when it does not."""

import asyncio
import itertools
from typing import Any

from gateway import lifecycle_messages as m
from gateway.admission import Admission
from gateway.generation_request import GenerationRequest
from gateway.request_journal import RequestJournal
from gateway.request_lifecycle import RequestLifecycle
from gateway.request_output import RequestOutput
from gateway.request_runner import RequestRunner
from gateway.request_timeline import RequestTimeline
from gateway.retry_budget import RetryBudget
from gateway.router import Assignment, RouteQuery
from gateway.turnstile import Turnstile
from kvrelay.config import RelaySettings
from kvrelay.errors import OverloadedError
from kvrelay.request_record import RequestRecord
from kvrelay.request_state import RequestState
from kvrelay.sampling_params import SamplingParams
from kvrelay.work import SequenceToken, Token, WorkId
from tests.gateway.lifecycle_simulation import make_lifecycle

REQUEST_ID = "a" * 32
FIRST = WorkId(REQUEST_ID, 1)


class OneWorker:
    """In place of the sessions: a decode worker that does what a test says."""

    def __init__(self) -> None:
        self.retries = RetryBudget(0.0)
        self.sent: list[m.Action] = []

    def choose(self, query: RouteQuery, request_id: str) -> Assignment:
        return Assignment("d1", None)

    def avoided_pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset()

    def send(self, action: m.Action, fingerprint: str) -> bool:
        self.sent.append(action)
        return True

    def forget(self, request_id: str) -> None:
        pass

    @property
    def pauses(self) -> list[bool]:
        return [action.paused for action in self.sent if isinstance(action, m.SendSetPaused)]


class Bench:
    def __init__(self, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        sampling = SamplingParams(temperature=0.0, max_tokens=1000)
        request = GenerationRequest(
            REQUEST_ID, "tiny", "f1", (5, 6, 7), sampling, "", loop.time(), loop.time() + 60, resumable=False
        )
        record = RequestRecord(
            request_id=REQUEST_ID,
            state=RequestState.QUEUED,
            attempt=1,
            tenant="",
            model="tiny",
            gateway_id="g",
            num_prompt_tokens=3,
            create_time_ms=0,
            update_time_ms=0,
            deadline_time_ms=0,
            remaining_ms=60_000,
            prompt_token_ids=(5, 6, 7),
            sampling=sampling,
        )
        self.worker = OneWorker()
        self.ended = asyncio.Event()
        output = RequestOutput()
        lifecycle: RequestLifecycle = make_lifecycle(1)
        self.runner = RequestRunner(
            request,
            lifecycle=lifecycle,
            output=output,
            detokenizers=None,
            journal=RequestJournal(record, output, request.deadline),
            timeline=RequestTimeline(request.submit_time, 0.0),
            admitted=Admission(10, 1000).admit(3, 0.0),
            sessions=self.worker,  # type: ignore[arg-type]
            settings=RelaySettings.model_validate({"max_unread_tokens": 10} | settings),
            turnstile=Turnstile(),
            on_end=lambda _: self.ended.set(),
        )
        self._indices = itertools.count()
        self.runner.start()
        self.runner.post(m.Reserved("d1", FIRST, b"t", "d1", 0))

    def say(self, num_tokens: int) -> None:
        """The decode worker says so many tokens, one a step."""
        for index in itertools.islice(self._indices, num_tokens):
            self.runner.post(m.DecodeTokens("d1", (SequenceToken(FIRST, 0, index, Token(7)),)))


async def test_a_sequence_pauses_while_its_reader_is_behind_and_goes_on_when_it_has_caught_up() -> None:
    bench = Bench()
    frames = bench.runner.open_reader().batches()
    bench.say(10)
    assert bench.worker.pauses == []
    bench.say(3)
    assert bench.worker.pauses == [True], "once"
    assert len(await anext(frames)) == 13
    assert bench.worker.pauses == [True], "they are on their way to the client"
    following = asyncio.ensure_future(anext(frames))
    await asyncio.sleep(0)
    assert bench.worker.pauses == [True, False]
    bench.say(1)
    assert len(await following) == 1
    bench.runner.cancel()
    assert isinstance(bench.worker.sent[-1], m.SendCancel)


async def test_a_reader_that_stays_behind_ends_the_request_with_resource_exhausted() -> None:
    bench = Bench(slow_client_timeout_ms=1)
    bench.runner.open_reader()
    bench.say(12)
    async with asyncio.timeout(10):
        await bench.ended.wait()
    assert isinstance(bench.runner.output.error, OverloadedError)
    assert isinstance(bench.worker.sent[-1], m.SendCancel)


async def test_a_fast_reader_is_not_held_up_by_a_slow_one() -> None:
    bench = Bench()
    slow, fast = bench.runner.open_reader(), bench.runner.open_reader()
    frames = fast.batches()
    for _ in range(5):
        following = asyncio.ensure_future(anext(frames))
        await asyncio.sleep(0)
        bench.say(8)
        await following
    assert bench.worker.pauses == []
    fast.close()
    await frames.aclose()  # type: ignore[attr-defined]
    bench.say(1)
    assert bench.worker.pauses == [True]
    slow.close()


async def test_the_pause_goes_with_the_request_to_another_attempt() -> None:
    bench = Bench()
    bench.runner.open_reader()
    bench.say(12)
    bench.runner.post(m.WorkerLost("d1"))
    second = WorkId(REQUEST_ID, 2)
    bench.runner.post(m.Reserved("d1", second, b"t", "d1", 0))
    assert bench.worker.pauses == [True]
    bench.runner.post(m.DecodeStarted("d1", second))
    assert bench.worker.pauses == [True, True]
