"""What a seed draws before anything runs: the cluster, the requests, and the faults with their
times. Plain values.
"""

from dataclasses import dataclass, replace
from enum import Enum
from random import Random

from tests.simulation.processes import WorkerShape
from tests.simulation.security import TENANTS, SecurityPlan
from tests.simulation.toy_model import KILLER_TOKEN, POISON_TOKEN

MAX_TOKENS = 96
SHORTEST_TIMEOUT_S = 0.02


class Fault(Enum):
    """Everything that can go wrong. Each is counted when it had an effect, not when it was drawn."""

    PREFILL_KILLED = "prefill worker killed"
    DECODE_KILLED = "decode worker killed"
    GATEWAY_KILLED = "gateway killed"
    RESUMED_ELSEWHERE = "client resumed at another gateway"
    SESSION_BROKEN = "session broken"
    PUSH_BROKEN = "push broken"
    PARTITION = "one direction closed beyond the window"
    SHORT_PARTITION = "one direction closed below the window"
    STALL = "process stopped below the window"
    ZOMBIE = "process stopped beyond the window, then continued"
    CHUNK_CORRUPT = "chunk corrupt"
    CHUNK_REPLAYED = "chunk replayed"
    CHUNK_TRUNCATED = "chunk truncated"
    CHUNK_FOREIGN = "chunk of another push"
    CHUNK_LOST = "chunk lost"
    CLIENT_CANCELLED = "client cancelled"
    DEADLINE = "deadline passed"
    SLOW_CLIENT = "client read slowly"
    PREEMPTION = "sequence preempted"
    WORKER_DRAINED = "worker drained"
    GATEWAY_DRAINED = "gateway drained"
    POISON = "prompt that fails its steps"
    KILLER = "prompt that kills workers"
    SAME_KEY = "idempotency key used again"
    KEY_CONFLICT = "idempotency key used with another body"
    REDIS_AWAY = "redis away"
    REDIS_LOST_WRITES = "redis lost writes"
    REDIS_FULL = "redis full"
    CLOCK_JUMPED = "wall clock jumped"
    REQUEST_CLAIMED = "request claimed by a stranger"
    REQUEST_TAKEN = "request given to another gateway"
    KEY_WITHDRAWN = "key of a caller withdrawn"
    QUOTA_EXCEEDED = "limit of a key reached"
    NO_PLACE = "no place at the gateway"
    FOREIGN_ASKED = "another tenant asked for a request"
    STRANGER_AT_WORKER = "session asked for by a stranger"


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request, or one more call with the same key."""

    number: int
    at_s: float
    gateway: int
    token_ids: tuple[int, ...]
    max_tokens: int
    num_sequences: int
    greedy: bool
    ignore_eos: bool
    seed: int
    stop_words: tuple[int, ...]
    tenant: str
    timeout_s: float
    resumable: bool
    key: str
    cancel_after_s: float | None
    pause_s: float
    """How long the client takes between two messages."""

    @property
    def is_poison(self) -> bool:
        return self.token_ids[0] == POISON_TOKEN

    @property
    def is_killer(self) -> bool:
        return self.token_ids[0] == KILLER_TOKEN


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """A fault that something does to the cluster."""

    at_s: float
    fault: Fault
    target: int
    """Which of those that it can strike."""
    seconds: float
    """How long it lasts."""
    restarts: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a seed's choices. What happens within the run, such as latencies, is drawn as it
    happens.
    """

    num_gateways: int
    prefill: list[WorkerShape]
    decode: list[WorkerShape]
    local_prefill_tokens: int | None
    requests: list[RequestPlan]
    faults: list[FaultPlan]
    security: SecurityPlan | None
    """None: without credentials."""


STRIKING = (
    Fault.PREFILL_KILLED,
    Fault.DECODE_KILLED,
    Fault.DECODE_KILLED,
    Fault.GATEWAY_KILLED,
    Fault.SESSION_BROKEN,
    Fault.PUSH_BROKEN,
    Fault.PARTITION,
    Fault.SHORT_PARTITION,
    Fault.STALL,
    Fault.ZOMBIE,
    Fault.CHUNK_CORRUPT,
    Fault.CHUNK_REPLAYED,
    Fault.CHUNK_TRUNCATED,
    Fault.CHUNK_FOREIGN,
    Fault.CHUNK_LOST,
    Fault.WORKER_DRAINED,
    Fault.GATEWAY_DRAINED,
    Fault.REDIS_AWAY,
    Fault.REDIS_LOST_WRITES,
    Fault.REDIS_FULL,
    Fault.CLOCK_JUMPED,
    Fault.REQUEST_CLAIMED,
    Fault.REQUEST_TAKEN,
)
_LASTING_S = {
    Fault.PARTITION: (0.8, 1.4),
    Fault.SHORT_PARTITION: (0.05, 0.25),
    Fault.STALL: (0.05, 0.3),
    Fault.ZOMBIE: (0.9, 1.6),
    Fault.REDIS_AWAY: (0.1, 1.0),
    Fault.REDIS_FULL: (0.1, 0.5),
    Fault.REQUEST_CLAIMED: (0.01, 0.3),
    Fault.REQUEST_TAKEN: (0.01, 0.3),
}


def make_plan(random: Random) -> Plan:
    """Draws a seed's plan."""
    num_requests = random.choice([1, 2, 2, 3, 4, 5])
    num_gateways = random.choice([1, 2, 2])
    block_size = random.choice([1, 2, 3, 4, 4])
    num_blocks = random.choice([MAX_TOKENS // block_size + 1, 48 // block_size + 1, 160 // block_size])
    requests: list[RequestPlan] = []
    capacity = min(MAX_TOKENS, num_blocks * block_size)
    for number in range(num_requests):
        requests.append(_make_request(random, number, num_gateways, requests, capacity))
    plan = Plan(
        num_gateways=num_gateways,
        prefill=[_make_shape(random, num_blocks, block_size) for _ in range(random.choice([0, 1, 1, 2, 2]))],
        decode=[_make_shape(random, num_blocks, block_size) for _ in range(random.choice([1, 2, 2, 3]))],
        local_prefill_tokens=random.choice([None, 0, 0, 8]),
        requests=requests,
        faults=sorted(
            (_make_fault(random) for _ in range(random.choice([0, 1, 1, 2, 2, 3, 4]))), key=lambda fault: fault.at_s
        ),
        security=None,
    )
    return _secured(random, plan) if random.random() < 0.5 else plan


def _secured(random: Random, plan: Plan) -> Plan:
    """With keys, limits and certificates. Each request is of a tenant that has a key."""
    requests = [replace(request, tenant=request.tenant or TENANTS[0]) for request in plan.requests]
    security = SecurityPlan(
        key_running_requests=random.choice([1, 1, 2, 8]),
        max_running_requests=random.choice([1, 1, 2, 8]),
        place_wait_ms=random.choice([20, 2000]),
        withdrawn=random.choice(["", *TENANTS]),
        withdrawn_at_s=random.uniform(0.0, 0.3),
    )
    if security.withdrawn:  # around the time at which gateways learn of it
        requests = [replace(request, at_s=request.at_s + random.uniform(0.0, 0.6)) for request in requests]
    return replace(plan, requests=requests, security=security)


def _make_shape(random: Random, num_blocks: int, block_size: int) -> WorkerShape:
    return WorkerShape(
        num_blocks=num_blocks,
        block_size=block_size,
        chunk_tokens=random.choice([4, 8, 16, 64]),
        max_sequences=random.choice([3, 4, 8]),
        max_waiting_works=random.choice([2, 8, 8]),
        caches_prefixes=random.random() < 0.8,
        max_draft_tokens=random.choice([0, 0, 3, 6]),
        shared_chunk_tokens=random.choice([None, 2]),
        step_s=random.choice([0.001, 0.003, 0.01]),
        message_bytes=random.choice([16, 64, 256, 4096]),
        slow_jobs=random.choice([0.0, 0.02, 0.3]),
    )


def _make_request(
    random: Random, number: int, num_gateways: int, earlier: list[RequestPlan], capacity: int
) -> RequestPlan:
    shared = [1 + token % 37 for token in range(40)]
    length = random.choice([random.randint(1, 8), random.randint(4, 20), random.randint(8, 30)])
    length = min(length, capacity - 2)
    common = random.randint(0, length)
    token_ids = shared[:common] + [random.randrange(1, 40) for _ in range(length - common)]
    character = random.random()
    if character < 0.03:
        token_ids[0] = POISON_TOKEN
    elif character < 0.05:
        token_ids[0] = KILLER_TOKEN
    keyed = [request for request in earlier if request.key]
    again = random.choice(keyed) if keyed and random.random() < 0.6 else None
    if again is not None and random.random() < 0.8:  # the same body
        return _repeat(random, again, number, num_gateways)
    return RequestPlan(
        number=number,
        at_s=random.uniform(0.1, 0.4),
        gateway=random.randrange(num_gateways),
        token_ids=tuple(token_ids),
        max_tokens=random.randint(1, max(1, min(capacity - length - 1, random.choice([4, 12, 24])))),
        num_sequences=random.choice([1, 1, 1, 2, 3]),
        greedy=random.random() < 0.5,
        ignore_eos=random.random() < 0.5,
        seed=random.randrange(1 << 32),
        stop_words=(random.randrange(1, 8),) if random.random() < 0.15 else (),
        tenant="" if random.random() < 0.7 else "other",
        timeout_s=random.choice([30.0, 30.0, 30.0, random.uniform(SHORTEST_TIMEOUT_S, 0.4)]),
        resumable=random.random() < 0.5,
        key=again.key if again is not None else random.choice(["", "", f"key {number}"]),
        cancel_after_s=random.uniform(0.0, random.choice([0.05, 0.3])) if random.random() < 0.2 else None,
        pause_s=random.choice([0.0, 0.0, 0.0, 0.0, 0.05]),
    )


def _repeat(random: Random, again: RequestPlan, number: int, num_gateways: int) -> RequestPlan:
    return RequestPlan(
        number=number,
        at_s=again.at_s + random.choice([0.0, random.uniform(0.0, 0.4)]),
        gateway=random.randrange(num_gateways),
        token_ids=again.token_ids,
        max_tokens=again.max_tokens,
        num_sequences=again.num_sequences,
        greedy=again.greedy,
        ignore_eos=again.ignore_eos,
        seed=again.seed,
        stop_words=again.stop_words,
        tenant=again.tenant,
        timeout_s=30.0,
        resumable=again.resumable,
        key=again.key,
        cancel_after_s=None,
        pause_s=0.0,
    )


def _make_fault(random: Random) -> FaultPlan:
    fault = random.choice(STRIKING)
    shortest, longest = _LASTING_S.get(fault, (0.0, 0.0))
    return FaultPlan(
        at_s=random.uniform(0.1, 0.7),
        fault=fault,
        target=random.randrange(1 << 16),
        seconds=random.uniform(shortest, longest),
        restarts=random.random() < 0.8,
    )
