"""A cluster in virtual time: real routing, real block managers, and workers that compute nothing.

A worker computes one prompt after the other, at a fixed rate. Gateways hear of loads and caches
late, and each turn of a conversation goes to any of them.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.routing_workload import Conversation, Turn
from gateway.routing.conditional_disaggregation import (
    LONG_PROMPT_SLOWDOWN,
    SHORT_PROMPT_TOKENS,
    SLOWDOWN,
    InFlightPrompts,
    predict,
)
from gateway.routing.router import RouteQuery, WorkerView
from gateway.routing.routing import Routing
from kvrelay.core.job import CacheChanges, JobId, WorkerLoad
from kvrelay.core.member import MemberRole
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockManager, BlockTable

MODEL = ModelSpec("simulated", "llama", KVLayout(1, 1, 1, "float32"), 50_000, 1_000_000, (0,), "f")
SALT = "salt"
ROWS_THAT_DOUBLE_A_STEP = 16


@dataclass(frozen=True, slots=True)
class ClusterShape:
    num_prefill: int = 4
    num_decode: int = 4
    num_gateways: int = 3
    num_blocks: int = 1024
    """Of each worker."""
    block_size: int = 16
    tokens_per_s: float = 2000.0
    """Of prompts, by each worker."""
    step_s: float = 0.02
    """For one token of each sequence of a small batch."""
    report_s: float = 0.005
    """Until gateways hear of what happened."""


@dataclass(slots=True)
class RoutingOutcome:
    strategy: str
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_hit_tokens: int = 0
    """Of prompts, not computed because they were cached where the prompt was computed."""
    num_local: int = 0
    """Prompts that a decode worker computed."""
    num_expected_tokens: int = 0
    num_found_tokens: int = 0
    """In the caches of both workers of a request."""
    max_index_entries: int = 0
    ttft_s: list[float] = field(default_factory=list)


def simulate(
    conversations: Sequence[Conversation], shape: ClusterShape, strategy: str, seed: int, max_entries: int | None = None
) -> RoutingOutcome:
    """Runs all conversations to their end. The same for the same seed."""
    cluster = _Cluster(shape, strategy, seed, max_entries)
    for conversation in conversations:
        cluster.at(conversation.begins_at, lambda each=conversation: cluster.begin_turn(each, 0))  # type: ignore[misc]
    cluster.run()
    return cluster.finish()


def simulate_best(conversations: Sequence[Conversation], shape: ClusterShape, seed: int) -> RoutingOutcome:
    """One worker of each kind, as fast as all together, that never evicts anything."""
    num_tokens = sum(len(turn.prompt) + len(turn.answer) for each in conversations for turn in each.turns)
    one = ClusterShape(
        num_prefill=1,
        num_decode=1,
        num_gateways=1,
        num_blocks=num_tokens,
        block_size=shape.block_size,
        tokens_per_s=shape.tokens_per_s * shape.num_prefill,
        step_s=shape.step_s / shape.num_decode,
        report_s=shape.report_s,
    )
    return simulate(conversations, one, "load", seed)


@dataclass(slots=True, eq=False)
class _Job:
    job_id: JobId
    conversation: Conversation
    turn_number: int
    arrived_at: float
    gateway: "_Gateway"
    decode: "_Worker"
    prefill: "_Worker"
    table: BlockTable | None = None

    @property
    def turn(self) -> Turn:
        return self.conversation.turns[self.turn_number]


class _Worker:
    def __init__(self, cluster: "_Cluster", role: MemberRole, number: int) -> None:
        self.worker_id = f"{role.value}-{number}"
        self.role = role
        self.blocks = BlockManager(cluster.shape.num_blocks, cluster.shape.block_size)
        self.num_running = 0
        self.reserving: deque[_Job] = deque()
        self._cluster = cluster
        self._queue: deque[tuple[_Job, int, Callable[[], None]]] = deque()
        """Jobs with the tokens to compute, estimated until they begin."""
        self._is_computing = False
        self._num_computed = 0

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            num_running=self.num_running + (self.role is MemberRole.PREFILL and self._is_computing),
            num_waiting=len(self._queue) + len(self.reserving) - self._is_computing,
            num_queued_prompt_tokens=sum(num_tokens for _, num_tokens, _ in self._queue),
            num_free_blocks=self.blocks.num_free_blocks,
            num_cached_blocks=self.blocks.num_cached_blocks,
            num_used_blocks=self.blocks.num_used_blocks,
            num_blocks=self.blocks.num_blocks,
            num_computed_prompt_tokens=self._num_computed,
        )

    def compute(self, job: _Job, on_computed: Callable[[], None]) -> None:
        num_cached = (
            self.blocks.match_prefix(job.turn.prompt, SALT) if job.table is None else job.table.num_cached_tokens
        )
        self._queue.append((job, len(job.turn.prompt) - num_cached, on_computed))
        if not self._is_computing:
            self._begin()
        self._cluster.report(self)

    def _begin(self) -> None:
        self._is_computing = bool(self._queue)
        if not self._queue:
            return
        job, _, on_computed = self._queue[0]
        is_local = self.role is MemberRole.DECODE
        table = job.table if is_local else self.blocks.allocate(job.turn.prompt, SALT)
        assert table is not None, "reserved"
        num_tokens = len(job.turn.prompt) - table.num_cached_tokens
        self._queue[0] = (job, num_tokens, on_computed)
        seconds = num_tokens / self._cluster.shape.tokens_per_s
        if is_local:
            is_long = self.num_running > 0 and num_tokens > SHORT_PROMPT_TOKENS
            seconds *= LONG_PROMPT_SLOWDOWN if is_long else SLOWDOWN
        self._cluster.after(seconds, lambda: self._end(job, table, num_tokens, on_computed))

    def _end(self, job: _Job, table: BlockTable, num_tokens: int, on_computed: Callable[[], None]) -> None:
        self._queue.popleft()
        self._num_computed += num_tokens
        self.blocks.commit(table, job.turn.prompt, len(job.turn.prompt))
        if self.role is MemberRole.PREFILL:
            self.blocks.release(table)
        self._cluster.on_computed(self, job, len(job.turn.prompt) - num_tokens)
        on_computed()
        self._begin()
        self._cluster.report(self)

    def try_reserve(self, job: _Job) -> bool:
        """Prompt and answer get their blocks at once."""
        try:
            table = self.blocks.allocate(job.turn.prompt, SALT)
        except OutOfBlocksError:
            return False
        try:
            self.blocks.grow(table, len(job.turn.prompt) + len(job.turn.answer))
        except OutOfBlocksError:
            self.blocks.release(table)
            return False
        job.table = table
        return True


class _Gateway:
    """As a gateway's sessions see the workers: loads come late, and assignments count until then."""

    def __init__(self, routing: Routing, workers: Sequence[_Worker]) -> None:
        self.routing = routing
        self.in_flight = {each.worker_id: InFlightPrompts() for each in workers}
        self._workers = {each.worker_id: each for each in workers}
        self._loads = {each.worker_id: each.load() for each in workers}
        self._assigned = {each.worker_id: (0, 0) for each in workers}

    def choose(self, job_id: JobId, prompt: Sequence[int], session_key: str) -> tuple[_Worker, _Worker]:
        query = RouteQuery(MODEL.fingerprint, len(prompt), token_ids=prompt, cache_salt=SALT, session_key=session_key)
        assignment = self.routing.choose([*map(self._view, self._workers.values())], query, job_id.request_id)
        assert assignment is not None, "there are workers of both kinds"
        assert assignment.prefill_worker_id is not None, "there are workers of both kinds"
        chosen = self._workers[assignment.decode_worker_id], self._workers[assignment.prefill_worker_id]
        for each in chosen:
            num_jobs, num_tokens = self._assigned[each.worker_id]
            self._assigned[each.worker_id] = num_jobs + 1, num_tokens + len(prompt)
        return chosen

    def expected_load(self, worker: _Worker) -> WorkerLoad:
        return self.in_flight[worker.worker_id].expected_load(self._loads[worker.worker_id])

    def load_of(self, worker: _Worker) -> WorkerLoad:
        return self._loads[worker.worker_id]

    def hear(self, worker: _Worker, load: WorkerLoad, changes: CacheChanges) -> None:
        self._loads[worker.worker_id] = load
        self._assigned[worker.worker_id] = 0, 0
        self.routing.on_cache_changes(worker.worker_id, changes)

    def _view(self, worker: _Worker) -> WorkerView:
        return WorkerView(
            worker.worker_id,
            worker.role,
            worker.worker_id,
            MODEL,
            worker.blocks.block_size,
            worker.blocks.num_blocks * worker.blocks.block_size,
            self._loads[worker.worker_id],
            *self._assigned[worker.worker_id],
        )


class _Cluster:
    def __init__(self, shape: ClusterShape, strategy: str, seed: int, max_entries: int | None) -> None:
        self.shape = shape
        self.outcome = RoutingOutcome(strategy)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._chance = random.Random(seed)
        decode = [_Worker(self, MemberRole.DECODE, number) for number in range(shape.num_decode)]
        prefill = [_Worker(self, MemberRole.PREFILL, number) for number in range(shape.num_prefill)]
        self._gateways = [
            _Gateway(Routing(strategy, random.Random(f"{seed}/{number}").random, max_entries), [*decode, *prefill])
            for number in range(shape.num_gateways)
        ]

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self._now + seconds, call)

    def run(self) -> None:
        while self._events:
            self._now, _, call = heapq.heappop(self._events)
            call()

    def finish(self) -> RoutingOutcome:
        for hits in (gateway.routing.hits for gateway in self._gateways):
            self.outcome.num_expected_tokens += hits.num_expected.total()
            self.outcome.num_found_tokens += hits.num_found.total()
        return self.outcome

    def report(self, worker: _Worker) -> None:
        load, changes = worker.load(), worker.blocks.take_changes()
        for gateway in self._gateways:
            self.after(self.shape.report_s, lambda gateway=gateway: self._hear(gateway, worker, load, changes))  # type: ignore[misc]

    def _hear(self, gateway: _Gateway, worker: _Worker, load: WorkerLoad, changes: CacheChanges) -> None:
        gateway.hear(worker, load, changes)
        if gateway.routing.index is not None:
            num_entries = gateway.routing.index.num_entries
            self.outcome.max_index_entries = max(self.outcome.max_index_entries, num_entries)

    def begin_turn(self, conversation: Conversation, number: int) -> None:
        gateway = self._chance.choice(self._gateways)
        job_id = JobId(f"{conversation.number}.{number}", 1, 0)
        decode, prefill = gateway.choose(job_id, conversation.turns[number].prompt, str(conversation.number))
        job = _Job(job_id, conversation, number, self._now, gateway, decode, prefill)
        decode.reserving.append(job)
        self._reserve(decode)

    def _reserve(self, decode: _Worker) -> None:
        while decode.reserving and decode.try_reserve(decode.reserving[0]):
            self._on_reserved(decode.reserving.popleft())
        self.report(decode)

    def _on_reserved(self, job: _Job) -> None:
        assert job.table is not None, "reserved"
        gateway, num_cached = job.gateway, job.table.num_cached_tokens
        self._found(job, job.decode, num_cached)
        num_uncached = len(job.turn.prompt) - num_cached
        # The gateway's view of the decode worker counts this reservation.
        decode_load, prefill_load = gateway.expected_load(job.decode), gateway.expected_load(job.prefill)
        is_local = predict(num_uncached, decode_load, prefill_load).is_local
        worker = job.decode if is_local else job.prefill
        gateway.in_flight[worker.worker_id].add(job.job_id, num_uncached, gateway.load_of(worker))
        self.outcome.num_local += is_local
        worker.compute(job, lambda: self._decode(job))

    def on_computed(self, worker: _Worker, job: _Job, num_cached: int) -> None:
        self.outcome.num_requests += 1
        self.outcome.num_prompt_tokens += len(job.turn.prompt)
        self.outcome.num_hit_tokens += num_cached
        self.outcome.ttft_s.append(self._now - job.arrived_at)
        job.gateway.in_flight[worker.worker_id].remove(job.job_id)
        if worker is job.prefill:
            self._found(job, worker, num_cached)
        job.gateway.routing.hits.forget(job.job_id.request_id)

    @staticmethod
    def _found(job: _Job, worker: _Worker, num_cached: int) -> None:
        job.gateway.routing.on_cached(job.job_id.request_id, worker.role, worker.worker_id, num_cached)

    def _decode(self, job: _Job) -> None:
        decode, table = job.decode, job.table
        assert table is not None, "reserved"
        decode.num_running += 1
        decode.blocks.commit(table, job.turn.prompt, len(job.turn.prompt))
        seconds = self.shape.step_s * (1 + decode.num_running / ROWS_THAT_DOUBLE_A_STEP) * len(job.turn.answer)
        self.report(decode)
        self.after(seconds, lambda: self._end(job, table))

    def _end(self, job: _Job, table: BlockTable) -> None:
        decode, tokens = job.decode, job.turn.prompt + job.turn.answer
        decode.num_running -= 1
        decode.blocks.commit(table, tokens, len(tokens) - 1)  # the last one is sampled, and not computed
        decode.blocks.release(table)
        self._reserve(decode)
        conversation, following = job.conversation, job.turn_number + 1
        if following < len(conversation.turns):
            self.after(conversation.turns[following].think_s, lambda: self.begin_turn(conversation, following))
