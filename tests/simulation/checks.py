"""What must hold: of every request's lifecycle at every step, and of the whole cluster at rest.

client    I1, I2, I6, T    spies    T    toy_model    I4    here    I3, I5, I7, and which errors a client may get for which faults
"""

from collections.abc import Iterable, Sequence

from gateway.lifecycle import events
from gateway.lifecycle.lifecycle import RequestLifecycle
from kvrelay import errors
from kvrelay.core.request_state import RequestState, check_edge, is_terminal
from tests.simulation.client import SimulatedClient, ViolationError
from tests.simulation.plan import Fault, Plan
from tests.simulation.processes import GatewayProcess, SimulatedProcess, WorkerProcess
from tests.simulation.redis_model import RedisModel

_GATEWAY_FAULTS = frozenset({Fault.GATEWAY_KILLED, Fault.GATEWAY_DRAINED, Fault.ZOMBIE, Fault.STALL})
_REDIS_FAULTS = frozenset({Fault.REDIS_AWAY, Fault.REDIS_LOST_WRITES, Fault.REDIS_FULL})
_WORKER_DEATHS = frozenset({Fault.PREFILL_KILLED, Fault.DECODE_KILLED, Fault.WORKER_DRAINED})


_KILLS = frozenset({Fault.PREFILL_KILLED, Fault.DECODE_KILLED})
_CLAIMS = frozenset({Fault.REQUEST_CLAIMED, Fault.REQUEST_TAKEN})
LONG_TIMEOUT_S = 30.0
"""Longer than any recovery."""
MAX_DEATHS = 2
"""Of workers, by one request."""


class CheckedLifecycle(RequestLifecycle):
    """A lifecycle whose every action is checked."""

    num_attempts = 0
    """Attempts of all lifecycles since it was set to 0."""

    def handle(self, event: events.Event) -> list[events.Action]:
        was_finished = self.finished
        actions = super().handle(event)
        if was_finished and actions:
            raise ViolationError(f"I1: {actions[0]} after the end")
        for action in actions:
            self._check(action)
        return actions

    def _check(self, action: events.Action) -> None:
        before = self.__dict__.setdefault("_checked_state", (RequestState.QUEUED, self.attempt))
        match action:
            case events.Emit(token):
                counts = self.__dict__.setdefault("_num_emitted", {})
                if token.job_id.attempt != self.attempt:
                    raise ViolationError(f"I5: attempt {token.job_id.attempt} emits while {self.attempt} runs")
                expected = counts.setdefault(token.sequence, token.index)
                if token.index != expected:
                    raise ViolationError(f"I1: index {token.index} is emitted instead of {expected}")
                counts[token.sequence] = token.index + 1
            case events.SetState(state, attempt):
                self._check_move(before, (state, attempt))
            case events.Finish(state):
                self._check_move(before, (state, before[1]))

    def _check_move(self, before: tuple[RequestState, int], after: tuple[RequestState, int]) -> None:
        if not check_edge(*before, *after):
            raise ViolationError(f"I7: from {before} to {after}")
        CheckedLifecycle.num_attempts += after[1] != before[1]
        self.__dict__["_checked_state"] = after


def check_end_of(client: SimulatedClient, clients: Sequence[SimulatedClient], plan: Plan) -> None:
    """Whether the client's end is one that the plan allows."""
    group = [other for other in clients if other is client or (client.plan.key and _same_key(client, other))]
    if client.cancelled:
        return
    if client.succeeded:
        if client.plan.is_poison or client.plan.is_killer:
            raise ViolationError("I2: a poisoned prompt succeeded")
        return
    problem = why_not_allowed(client, group, plan)
    if problem is not None:
        raise ViolationError(f"{problem}: client {client.plan.number} got {client.error!r}")


def why_not_allowed(client: SimulatedClient, group: Sequence[SimulatedClient], plan: Plan) -> str | None:
    """Why the client's error is wrong, or None."""
    faults = {fault.fault for fault in plan.faults}
    gateway_faults, redis_faults = faults & _GATEWAY_FAULTS, faults & _REDIS_FAULTS
    match client.error:
        case errors.DeadlineError():
            soonest = min(other.deadline for other in group if other.deadline)
            # A poisoned prompt opens breakers, and waits for them until it has no time left.
            is_long = all(other.plan.timeout_s >= LONG_TIMEOUT_S and not other.plan.is_poison for other in group)
            if faults & _CLAIMS and is_long:
                return "I6: silent until its deadline"
            return None if client.loop.world.now >= soonest - 0.1 else "I6: too early"
        case errors.CancelledRequestError():
            is_left = any(other.cancelled for other in group) or _is_withdrawn(client, plan)
            return None if is_left else "nobody cancelled it"
        case errors.UnauthenticatedError():
            return None if _is_withdrawn(client, plan) else "T: its key was not withdrawn"
        case errors.QuotaError():
            assert plan.security is not None
            num_own = sum(request.tenant == client.plan.tenant for request in plan.requests)
            return None if num_own > plan.security.key_running_requests else "T: its key had not reached the limit"
        case errors.InternalError():
            # Who was alone on two workers that were killed from outside looks like one that kills.
            num_kills = sum(fault.fault in _KILLS for fault in plan.faults)
            is_guilty = client.plan.is_poison or client.plan.is_killer
            return None if is_guilty or num_kills >= MAX_DEATHS else "an innocent request is blamed"
        case errors.StoreFullError():
            return None if Fault.REDIS_FULL in faults else "redis was not full"
        case errors.OverloadedError():
            places = None if plan.security is None else plan.security.max_running_requests
            return None if places is not None and len(plan.requests) > places else "there was a place for it"
        case errors.IdempotencyConflictError():
            bodies = {(other.plan.token_ids, other.plan.seed) for other in group}
            return None if len(bodies) > 1 else "the bodies are the same"
        case errors.RequestNotFoundError():
            return None if gateway_faults or redis_faults else "its record cannot be lost"
        case errors.ModelNotFoundError():
            return None if gateway_faults and redis_faults else "its workers are known"
        case errors.UnavailableError():
            lost_for_good = any(fault.fault in _WORKER_DEATHS and not fault.restarts for fault in plan.faults)
            is_killing = any(request.is_killer for request in plan.requests)
            excused = (
                Fault.REQUEST_TAKEN in faults
                or gateway_faults
                or redis_faults
                or lost_for_good
                or is_killing
                or client.plan.is_poison
            )
            return None if excused else "every fault of this seed can be survived"
    return "no fault of this seed explains it"


def _is_withdrawn(client: SimulatedClient, plan: Plan) -> bool:
    security = plan.security
    if security is None or security.withdrawn != client.plan.tenant:
        return False
    return client.loop.world.now >= security.withdrawn_at_s


def check_deaths(num_deaths: int, plan: Plan) -> None:
    """A prompt that kills workers is quarantined, as long as the gateway that counts lives and sees
    that they died.
    """
    if {fault.fault for fault in plan.faults} & (_GATEWAY_FAULTS | _REDIS_FAULTS):
        return
    killers = {(request.number if not request.key else request.key) for request in plan.requests if request.is_killer}
    if num_deaths > MAX_DEATHS * len(killers):
        raise ViolationError(f"I6: {len(killers)} prompts killed {num_deaths} workers")


def check_keys(clients: Sequence[SimulatedClient], plan: Plan) -> None:
    """Calls with the same key and body are one request, as long as nobody forgets the key."""
    if {fault.fault for fault in plan.faults} & (_GATEWAY_FAULTS | _REDIS_FAULTS):
        return
    ids: dict[object, str] = {}
    for client in clients:
        request = client.plan
        if request.key and client.succeeded:
            body = (request.key, request.tenant, request.token_ids, request.seed)
            if ids.setdefault(body, client.request_id) != client.request_id:
                raise ViolationError(f"KEY: client {request.number} got another request than one with the same key")


def _same_key(client: SimulatedClient, other: SimulatedClient) -> bool:
    return (client.plan.key, client.plan.tenant) == (other.plan.key, other.plan.tenant)


def may_be_late(plan: Plan) -> bool:
    """Whether a gateway may stand still, and with it its looks at the keys file."""
    return bool({fault.fault for fault in plan.faults} & _GATEWAY_FAULTS)


def may_lose_writes(plan: Plan) -> bool:
    """Whether Redis may know less than what clients were told: it forgot, or was away when a
    gateway ended.
    """
    faults = {fault.fault for fault in plan.faults}
    return Fault.REDIS_LOST_WRITES in faults or bool(faults & _REDIS_FAULTS and faults & _GATEWAY_FAULTS)


def check_store(
    redis: RedisModel, alive_ids: Iterable[str], clients: Sequence[SimulatedClient], loses_writes: bool
) -> None:
    """At rest the store knows of every request whose it is, and of a living gateway's how it ended."""
    tenants = {client.request_id: client.plan.tenant for client in clients if client.request_id}
    alive = set(alive_ids)
    states: dict[str, RequestState] = {}
    """Of living gateways' requests."""
    for key, stored in redis.data.hashes.items():
        if not key.endswith(":request"):
            continue
        request_id = stored["request_id"].decode()
        if stored["tenant"].decode() != tenants.get(request_id, stored["tenant"].decode()):
            raise ViolationError(f"T: {key} is of {stored['tenant']!r}, and was asked for by {tenants[request_id]!r}")
        if stored["gateway_id"].decode() not in alive:
            continue
        state = states[request_id] = RequestState(stored["state"].decode())
        if not is_terminal(state) and not loses_writes:
            raise ViolationError(f"I6: {key} stays {state.name} though its gateway lives")
    for client in clients:
        if (
            client.succeeded
            and states.get(client.request_id) not in (RequestState.SUCCEEDED, None)
            and not loses_writes
        ):
            raise ViolationError(f"I7: {client.request_id} succeeded and is {states[client.request_id].name}")


def wrong_caches_of(processes: Iterable[SimulatedProcess]) -> list[str]:
    """Where a gateway believes that a worker caches other blocks than it does."""
    alive = [process for process in processes if process.is_alive]
    workers = {process.instance_id: process for process in alive if isinstance(process, WorkerProcess)}
    gateways = [process.gateway for process in alive if isinstance(process, GatewayProcess) and process.gateway]
    return [
        f"{gateway.address} is wrong about the cache of {worker.loop.name}"
        for gateway in gateways
        for session in gateway.sessions.sessions()
        if (worker := workers.get(session.worker_id)) is not None
        and (index := gateway.sessions.routing.index) is not None
        and index.hashes_of(session.worker_id) != worker.blocks.prefixes
    ]


def leftovers_of(processes: Iterable[SimulatedProcess]) -> list[str]:
    """I3: what is still held."""
    return [leftover for process in processes if process.is_alive for leftover in process.leftovers()]
