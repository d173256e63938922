"""One key that asks for everything, and 20 that ask for little, by counts of steps.

Admission and both schedulers run as in their processes, a tick at a time: clients come, places and
blocks are given out, each worker computes one step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.events import BlocksReserved
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from gateway.requests.admission import Admission, Admitted, Bounds
from gateway.requests.key_limits import Caller
from gateway.requests.place_queue import Waiting
from kvrelay.core.job import Job, JobId
from kvrelay.errors import OverloadedError, QuotaError
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.security.principal import Limits
from kvrelay.worker.commands import JobEnded, JobFailed
from kvrelay.worker.sequence import PreparedJob
from prefill_worker.scheduling.events import PromptComputed
from prefill_worker.scheduling.scheduler import PrefillLimits, PrefillScheduler
from tests.support.jobs import make_job
from tests.support.simulated_pool import MODEL, SimulatedPool, make_token

NUM_PLACES = 32
NUM_BLOCKS = 128
BLOCK_SIZE = 4
CHUNK = 16
SLOTS = 16
NUM_SMALL = 20
ROUNDS = 6
"""Requests of each small key, one after the other."""
GREEDY = {
    "long prompts of eight sequences": (40, 20, 8),
    "long prompts with short answers": (60, 2, 1),
    "short prompts with long answers": (4, 60, 1),
    "short prompts with short answers": (5, 2, 1),
}
"""Prompt tokens, output tokens and sequences of each request of the greedy key."""
SMALL_PROMPT, SMALL_OUTPUT = 6, 4
MAX_TICKS = 4000


def caller(name: str) -> Caller:
    return Caller(name, name, Limits(running_requests=NUM_PLACES // 2, unattended_requests=2), waits=True)


@dataclass(eq=False)
class Request:
    caller: Caller
    job: Job
    begin: int
    place: Admitted | None = None
    waiting: Waiting | None = None
    first_token: int | None = None
    ended: bool = False


@dataclass
class Cluster:
    """A gateway, a prefill worker and a decode worker without anything between them."""

    tick: int = 0
    num_refused: int = 0
    num_made: int = 0
    running: dict[JobId, Request] = field(default_factory=dict)
    waiting: list[Request] = field(default_factory=list)
    ends_of_push: list[PromptComputed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = Admission(Bounds(NUM_PLACES, 10**6, 64))
        self.prefill_blocks, self.decode_blocks = (BlockManager(NUM_BLOCKS, BLOCK_SIZE) for _ in range(2))
        self.prefill = PrefillScheduler(self.prefill_blocks, MODEL, PrefillLimits(CHUNK, 1000))
        self.decode = DecodeScheduler(self.decode_blocks, DecodeLimits(CHUNK, SLOTS, 1000), WriteGrants())
        self.prefill_pool, self.decode_pool = (SimulatedPool(NUM_BLOCKS, BLOCK_SIZE) for _ in range(2))
        self.tables: dict[JobId, tuple[int, ...]] = {}

    def ask(self, by: Caller, num_prompt_tokens: int, num_output_tokens: int, n: int = 1) -> Request | None:
        """None: refused."""
        self.num_made += 1
        prompt = [(self.num_made * 7 + position * self.num_made) % 50 for position in range(num_prompt_tokens)]
        job = make_job(prompt, num_output_tokens, f"{self.num_made:032x}", num_sequences=n, cache_salt=by.share)
        request = Request(by, job, self.tick)
        try:
            self._begin(request, self.admission.take_place(by, self.tick))
        except QuotaError:
            self.num_refused += 1
            return None
        except OverloadedError:
            try:
                request.waiting = self.admission.wait_for_place(by, self.tick, lambda: None)
            except OverloadedError:
                self.num_refused += 1
                return None
            self.waiting.append(request)
        return request

    def _begin(self, request: Request, place: Admitted) -> None:
        request.place = place
        place.admit_prompt(len(request.job.token_ids))
        self.running[request.job.job_id] = request
        self.decode.reserve(PreparedJob(request.job))

    def step(self) -> None:
        for request in list(self.waiting):
            assert request.waiting is not None
            if request.waiting.has_place:
                self.waiting.remove(request)
                self._begin(request, self.admission.claim(request.waiting, self.tick))
        self._end_pushes()
        decode_step = self.decode.schedule()
        self._on_decode_events()
        prefill_step = self.prefill.schedule()
        if prefill_step is not None:
            self.prefill.complete(prefill_step, self.prefill_pool.run(prefill_step))
        self._on_prefill_events()
        if decode_step is not None:
            self.decode.complete(decode_step, self.decode_pool.run(decode_step))
        self._on_decode_events()
        self.decode_blocks.check_integrity()
        self.prefill_blocks.check_integrity()
        self.tick += 1

    def _end_pushes(self) -> None:
        ends, self.ends_of_push = self.ends_of_push, []
        for computed in ends:
            job = self.running[computed.job_id].job
            self.decode_pool.write(self.tables.pop(computed.job_id), job.token_ids, 0, len(job.token_ids))
            self.decode.push_ended(job.job_id, [make_token(job, number, job.token_ids) for number in job.sequences])
            self.prefill.sender_ended(job.job_id, None)

    def _on_prefill_events(self) -> None:
        for event in self.prefill.drain_events():
            assert not isinstance(event, JobFailed), event
            if isinstance(event, PromptComputed):
                request = self.running[event.job_id]
                request.first_token = self.tick
                assert request.place is not None
                request.place.on_first_token(self.tick)
                self.ends_of_push.append(event)

    def _on_decode_events(self) -> None:
        for event in self.decode.drain_events():
            assert not isinstance(event, JobFailed), event
            if isinstance(event, BlocksReserved):
                self.tables[event.job.job_id] = event.block_ids
                self.prefill.start(PreparedJob(event.job))
            elif isinstance(event, JobEnded):
                request = self.running.pop(event.job_id)
                request.ended = True
                assert request.place is not None
                request.place.release(self.tick)


def small_clients(cluster: Cluster, ttfts: list[int]) -> Iterator[None]:
    """Each of the small keys sends its next request some ticks after its last one has ended."""
    callers = [caller(f"small {number}") for number in range(NUM_SMALL)]
    begins_at = {number: 60 + 3 * number for number in range(NUM_SMALL)}
    left = dict.fromkeys(range(NUM_SMALL), ROUNDS)
    requests: dict[int, Request] = {}
    while left or requests:
        for number, request in list(requests.items()):
            if request.ended:
                assert request.first_token is not None
                ttfts.append(request.first_token - request.begin + 1)
                del requests[number]
                begins_at[number] = cluster.tick + 5 + number
        for number in [each for each in left if each not in requests and begins_at[each] <= cluster.tick]:
            new = cluster.ask(callers[number], SMALL_PROMPT, SMALL_OUTPUT)
            assert new is not None, "none of them is refused"
            requests[number] = new
            left[number] -= 1
            if not left[number]:
                del left[number]
        yield


def served(greedy: tuple[int, int, int] | None = None) -> tuple[list[int], Cluster]:
    """Times to first token of the small ones, in steps."""
    cluster = Cluster()
    ttfts: list[int] = []
    everything = caller("greedy")
    for _ in small_clients(cluster, ttfts):
        if greedy is not None:
            for _ in range(NUM_PLACES if cluster.tick else 300):
                cluster.ask(everything, *greedy)
        cluster.step()
        assert cluster.tick < MAX_TICKS
    return ttfts, cluster


def p99(values: list[int]) -> int:
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


@pytest.mark.parametrize("greedy", GREEDY.values(), ids=GREEDY)
def test_a_key_that_asks_for_everything_delays_20_others_by_at_most_half(greedy: tuple[int, int, int]) -> None:
    undisturbed, _ = served()
    disturbed, cluster = served(greedy)
    assert len(undisturbed) == len(disturbed) == NUM_SMALL * ROUNDS
    assert cluster.num_refused > 100, "it asked for more than it may have"
    assert p99(disturbed) <= 1.5 * p99(undisturbed), (sorted(undisturbed)[-5:], sorted(disturbed)[-5:])


def test_the_greedy_key_is_served_as_well() -> None:
    _, cluster = served(GREEDY["long prompts of eight sequences"])
    num_running = cluster.admission.num_running_requests
    while cluster.running and cluster.tick < MAX_TICKS:
        cluster.step()
    assert num_running > 0
    assert cluster.admission.num_running_requests == 0, "all ended"
