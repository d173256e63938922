"""A client that reads too slowly pauses its sequence, and ends it if it does not catch up."""

import asyncio
import itertools
from typing import Any

from gateway.lifecycle import events
from gateway.lifecycle.generation_request import GenerationRequest
from gateway.lifecycle.lifecycle import RequestLifecycle
from gateway.requests.admission import Admission, Bounds
from gateway.requests.cache_salts import CacheSalts
from gateway.requests.key_limits import Caller
from gateway.requests.runner import RequestRunner, RunnerContext
from gateway.routing.retry_budget import RetryBudget
from gateway.routing.router import Assignment, RouteQuery
from gateway.state.journal import RequestJournal
from gateway.streaming.output_log import RequestOutput
from gateway.streaming.write_throttle import WriteThrottle
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.timelines import Timelines
from kvrelay.config.settings import RequestSettings
from kvrelay.core.job import JobId, SequenceToken, Token
from kvrelay.core.request_state import RequestState
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import OverloadedError
from kvrelay.state.request_record import RequestRecord
from tests.support.lifecycle_simulation import make_lifecycle

REQUEST_ID = "a" * 32
FIRST = JobId(REQUEST_ID, 1)


class OneWorker:
    """Replaces the sessions: a decode worker under the test's control."""

    def __init__(self) -> None:
        self.retry_budget = RetryBudget(0.0)
        self.sent: list[events.Action] = []

    def choose(self, query: RouteQuery, request_id: str) -> Assignment:
        return Assignment("d1", None)

    def avoided_pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset()

    def send(self, action: events.Action, fingerprint: str) -> bool:
        self.sent.append(action)
        return True

    def forget(self, request_id: str) -> None:
        pass

    @property
    def pauses(self) -> list[bool]:
        return [action.paused for action in self.sent if isinstance(action, events.SendSetPaused)]


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
        lifecycle: RequestLifecycle = make_lifecycle(1)
        self.runner = RequestRunner(
            request,
            lifecycle,
            RequestJournal(record, RequestOutput(), request.deadline),
            detokenizers=None,
            admitted=Admission(Bounds(10, 1000)).admit_anyway(3, Caller(), 0.0),
            context=RunnerContext(
                RequestSettings.model_validate({"max_unread_tokens": 10} | settings),
                self.worker,  # type: ignore[arg-type]
                WriteThrottle(),
                GatewayMetrics(),
                Timelines(10),
                CacheSalts(),
            ),
            on_ended=lambda _: self.ended.set(),
        )
        self._indices = itertools.count()
        self.runner.start()
        self.runner.post(events.Reserved("d1", FIRST, b"t", "d1", 0))

    def say(self, num_tokens: int) -> None:
        """The decode worker sends `num_tokens` tokens, one a step."""
        for index in itertools.islice(self._indices, num_tokens):
            self.runner.post(events.DecodeTokens("d1", (SequenceToken(FIRST, 0, index, Token(7)),)))


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
    assert isinstance(bench.worker.sent[-1], events.SendCancel)


async def test_a_reader_that_stays_behind_ends_the_request_with_resource_exhausted() -> None:
    bench = Bench(slow_client_timeout_ms=1)
    bench.runner.open_reader()
    bench.say(12)
    async with asyncio.timeout(30):
        await bench.ended.wait()
    assert isinstance(bench.runner.output.error, OverloadedError)
    assert isinstance(bench.worker.sent[-1], events.SendCancel)


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


async def test_a_paused_request_stays_paused_in_its_next_attempt() -> None:
    bench = Bench()
    bench.runner.open_reader()
    bench.say(12)
    bench.runner.post(events.WorkerLost("d1"))
    second = JobId(REQUEST_ID, 2)
    bench.runner.post(events.Reserved("d1", second, b"t", "d1", 0))
    assert bench.worker.pauses == [True]
    bench.runner.post(events.DecodeStarted("d1", second))
    assert bench.worker.pauses == [True, True]
