"""Two workers in virtual time, with their real schedulers and the gateway's real prediction."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from random import Random

from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.events import BlocksReserved
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from gateway.routing.conditional_disaggregation import InFlightPrompts, predict
from gateway.routing.handoff_costs import HandoffCosts
from kvrelay.core.job import Job, JobId, SequenceToken, Token
from kvrelay.core.prompt_pace import ChunkRange, PromptPace
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.worker.sequence import PreparedJob
from kvrelay.worker.step import Step
from kvrelay.worker.verification import accept_tokens
from prefill_worker.scheduling.events import PromptComputed, PromptStarted
from prefill_worker.scheduling.scheduler import PrefillLimits, PrefillScheduler
from tests.support.jobs import make_job
from tests.support.simulated_pool import MODEL as SMALL_MODEL

MODEL = replace(SMALL_MODEL, max_context_tokens=8192)
NUM_BLOCKS, BLOCK_SIZE = 20_000, 16
CHUNK = ChunkRange(256, 128, 1024, 0.1)
SHARED_CHUNK = ChunkRange(16, 16, 1024, 0.025)

Place = Callable[[float, float], bool]
"""(predicted seconds on decode and on prefill worker) → whether to prefill locally."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a step takes; with noise, up to so much more, and now and then ten times as long."""

    tokens_per_s: float
    step_s: float = 0.01
    s_per_sequence: float = 0.001
    noise: float = 0.0

    def seconds(self, step: Step, random: Random) -> float:
        num_prompt_tokens = sum(entry.num_tokens for entry in step.entries if entry.is_of_prompt)
        num_decoding = sum(not entry.is_of_prompt for entry in step.entries)
        seconds = self.step_s + num_prompt_tokens / self.tokens_per_s + num_decoding * self.s_per_sequence
        if not self.noise:
            return seconds
        return seconds * random.uniform(1.0, 1.0 + self.noise) * (10.0 if random.random() < 0.005 else 1.0)


@dataclass(frozen=True, slots=True)
class Link:
    tokens_per_s: float
    tail_s: float = 0.005


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    num_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class Outcome:
    ready_s: dict[JobId, float] = field(default_factory=dict)
    """From arrival until the first token is there and the sequence can be decoded."""
    local: set[JobId] = field(default_factory=set)

    def mean_s(self, num_first: int) -> float:
        """Without the first ones."""
        later = [
            self.ready_s[job_id] for job_id in sorted(self.ready_s, key=lambda job_id: job_id.request_id)[num_first:]
        ]
        return sum(later) / len(later)


def arrivals(random: Random, num: int, mean_gap_s: float, lengths: tuple[tuple[int, int], ...]) -> Iterator[Arrival]:
    """`lengths`: ranges of prompt tokens, each as likely."""
    at = 0.0
    for _ in range(num):
        at += random.expovariate(1 / mean_gap_s)
        yield Arrival(at, random.randint(*random.choice(lengths)), random.randint(8, 48))


class PlacementSimulation:
    def __init__(self, decode: Speed, prefill: Speed, link: Link, place: Place, seed: int) -> None:
        self.outcome = Outcome()
        self._random = Random(seed)
        self._speeds = {"decode": decode, "prefill": prefill}
        self._link = link
        self._place = place
        self._now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._decode = DecodeScheduler(
            BlockManager(NUM_BLOCKS, BLOCK_SIZE, False),
            DecodeLimits(CHUNK.most, 64, 10_000),
            WriteGrants(),
            pace=PromptPace(CHUNK, SHARED_CHUNK),
        )
        self._prefill = PrefillScheduler(
            BlockManager(NUM_BLOCKS, BLOCK_SIZE, False), MODEL, PrefillLimits(CHUNK.most, 10_000), PromptPace(CHUNK)
        )
        self._busy: set[str] = set()
        self._in_flight = {"decode": InFlightPrompts(), "prefill": InFlightPrompts()}
        self._handoffs = HandoffCosts()
        self._num_tokens: dict[JobId, int] = {}
        self._arrived_at: dict[JobId, float] = {}
        self._began_at: dict[JobId, float] = {}

    def run(self, requests: list[Arrival]) -> Outcome:
        for number, request in enumerate(requests):
            tokens = [(number + index) % 40 + 1 for index in range(request.num_tokens)]
            job = make_job(tokens, request.num_output_tokens, request_id=f"{number:032x}")
            self._num_tokens[job.job_id] = request.num_tokens
            self._arrived_at[job.job_id] = request.at
            self._at(request.at, partial(self._arrive, job))
        while self._queue:
            self._now, _, action = heapq.heappop(self._queue)
            action()
        assert len(self.outcome.ready_s) == len(requests)
        return self.outcome

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._numbers), action))

    def _arrive(self, job: Job) -> None:
        self._decode.reserve(PreparedJob(job))
        self._on_decode_events()

    def _on_decode_events(self) -> None:
        self._on_admitted(self._decode)
        self._kick("decode", self._decode)

    def _on_admitted(self, scheduler: DecodeScheduler | PrefillScheduler) -> None:
        for event in scheduler.drain_events():
            match event:
                case BlocksReserved(job):
                    self._start(job)
                case PromptStarted(job):
                    self._began_at[job.job_id] = self._now

    def _start(self, job: Job) -> None:
        num_tokens = len(job.token_ids)
        loads = {"decode": self._decode.load(), "prefill": self._prefill.load()}
        expected = {name: self._in_flight[name].expected_load(load) for name, load in loads.items()}
        handoff = self._handoffs.to("d", self._now)
        prediction = predict(num_tokens, expected["decode"], expected["prefill"], handoff)
        is_local = self._place(prediction.on_decode_worker, prediction.on_prefill_worker)
        name = "decode" if is_local else "prefill"
        self._in_flight[name].add(job.job_id, num_tokens, loads[name])
        if is_local:
            self.outcome.local.add(job.job_id)
            self._decode.run_prompt(job.job_id)
        else:
            self._handoffs.begin(job.job_id, "d", num_tokens)
            self._prefill.start(PreparedJob(job))
            self._kick("prefill", self._prefill)

    def _kick(self, name: str, scheduler: DecodeScheduler | PrefillScheduler) -> None:
        if name in self._busy:
            return
        step = scheduler.schedule()
        self._on_admitted(scheduler)
        if step is None:
            return
        self._busy.add(name)
        seconds = self._speeds[name].seconds(step, self._random)
        self._at(self._now + seconds, lambda: self._step_ended(name, scheduler, step, seconds))

    def _step_ended(self, name: str, scheduler: DecodeScheduler | PrefillScheduler, step: Step, seconds: float) -> None:
        self._busy.discard(name)
        prompts = [entry.num_tokens for entry in step.entries if entry.is_of_prompt]
        scheduler.pace.record_step(sum(prompts), len(step.entries) - len(prompts), seconds)
        sampled = [Token(5) for entry in step.entries for _ in entry.continued]
        tokens = accept_tokens([entry for entry in step.entries if entry.continued], sampled, MODEL)
        scheduler.complete(step, tokens)
        if isinstance(scheduler, DecodeScheduler):
            for token in tokens:
                if token.index == 0:
                    self._in_flight["decode"].remove(token.job_id)
                    self._ready(token.job_id)
            self._on_decode_events()
            return
        for event in scheduler.drain_events():
            if isinstance(event, PromptComputed):
                self._in_flight["prefill"].remove(event.job_id)
                self._send_rest(event.job_id, event.tokens)
        self._kick("prefill", self._prefill)

    def _send_rest(self, job_id: JobId, first_tokens: tuple[SequenceToken, ...]) -> None:
        num_tokens = self._num_tokens[job_id]
        hidden_s = self._now - self._began_at[job_id]
        wire_s = num_tokens / self._link.tokens_per_s
        exposed_s = self._link.tail_s + max(0.0, wire_s - hidden_s)

        def pushed() -> None:
            times = (hidden_s + exposed_s) * 1000, exposed_s * 1000, wire_s * 1000
            self._handoffs.record(job_id, *times, now=self._now)
            self._prefill.sender_ended(job_id, None)
            self._decode.push_ended(job_id, first_tokens)
            self._ready(job_id)
            self._on_decode_events()
            self._kick("prefill", self._prefill)

        self._at(self._now + exposed_s, pushed)

    def _ready(self, job_id: JobId) -> None:
        self.outcome.ready_s[job_id] = self._now - self._arrived_at[job_id]
