"""Runs one seed from its plan to rest, and says what went wrong and which faults had an effect."""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.config.settings import GatewaySettings, RequestSettings, ServerSettings
from kvrelay.core.member import MemberRole
from tests.simulation.checks import (
    CheckedLifecycle,
    check_deaths,
    check_end_of,
    check_keys,
    check_store,
    leftovers_of,
    may_be_late,
    may_lose_writes,
    wrong_caches_of,
)
from tests.simulation.client import SimulatedClient, ViolationError
from tests.simulation.environment import START_OF_WALL_CLOCK, simulated_environment
from tests.simulation.faults import Faults
from tests.simulation.network import Network
from tests.simulation.plan import Fault, Plan, make_plan
from tests.simulation.processes import DecodeProcess, GatewayProcess, SimulatedProcess, Slot, Surroundings, slots_of
from tests.simulation.redis_model import RedisModel
from tests.simulation.security import SimulatedSecurity
from tests.simulation.spies import Spy
from tests.simulation.toy_model import ForeignKVError
from tests.simulation.virtual_time import SimulationError, World

LIVENESS_WINDOW_MS = 600
WORKER_WAIT_MS = 4000
RESUME_GRACE_MS = 400
RESTART_S = 0.2
WORKERS_FIRST_S = 0.02
"""So long before the gateways, so that these find them at once."""
LOOK_S = 0.1
"""Between two looks at the cluster."""
REST_S = 8.0
"""So long after the last client's end, nothing may be held any more."""
MAX_S = 120.0

_REQUEST_SETTINGS = {
    value: RequestSettings(
        local_prefill_tokens=value, worker_wait_ms=WORKER_WAIT_MS, resume_grace_ms=RESUME_GRACE_MS, max_attempts=8
    )
    for value in (None, 0, 8)
}
_SERVER_SETTINGS = ServerSettings(liveness_window_ms=LIVENESS_WINDOW_MS)


def settings_of(plan: Plan) -> GatewaySettings:
    """Of all gateways."""
    requests, security = _REQUEST_SETTINGS[plan.local_prefill_tokens], plan.security
    if security is None:
        return GatewaySettings(server=_SERVER_SETTINGS, requests=requests)
    return GatewaySettings(
        server=_SERVER_SETTINGS,
        requests=requests.model_copy(update={"max_running_requests": security.max_running_requests}),
        quotas=QuotaSettings(place_wait_ms=security.place_wait_ms),
    )


@dataclass
class Outcome:
    """What became of a seed."""

    seed: int
    problems: list[str] = field(default_factory=list)
    fired: Counter[Fault] = field(default_factory=Counter)
    num_requests: int = 0
    num_succeeded: int = 0
    num_attempts: int = 0
    """Attempts beyond the first."""
    num_callbacks: int = 0
    num_expected_tokens: int = 0
    """In prefix caches, by gateways."""
    virtual_s: float = 0.0
    digest: tuple[object, ...] = ()
    """Equal for equal runs."""


def run_seed(seed: int, trace: Callable[[str], None] | None = None) -> Outcome:
    """Runs one seed.

    Args:
        seed: decides everything.
        trace: gets a line for whatever happens.
    """
    world = World(seed)
    network = Network(world)
    outcome = Outcome(seed)
    log = None if trace is None else lambda line: trace(f"{world.now:9.4f} {_place_of(world)} {line}")
    with simulated_environment(world, network, CheckedLifecycle, log) as wall_clock:
        CheckedLifecycle.num_attempts = 0
        plan = make_plan(world.random)
        redis = RedisModel(lambda: int((START_OF_WALL_CLOCK + world.now) * 1000))
        security = None if plan.security is None else SimulatedSecurity(plan.security)
        surroundings = Surroundings(world, network, redis, security)
        slots = slots_of(surroundings, settings_of(plan), plan.num_gateways, plan.prefill, plan.decode)
        faults = Faults(world, network, redis, wall_clock, slots)
        run = _Run(surroundings, plan, slots, faults)
        if trace is not None:
            trace(str(plan))
            network.trace = faults.trace = log
        try:
            run.run()
        except (ViolationError, ForeignKVError, SimulationError, AssertionError) as violation:
            outcome.problems.append(str(violation) or repr(violation))
        finally:
            outcome.problems += world.problems
            run.fill(outcome)
            world.close()
    return outcome


def _place_of(world: World) -> str:
    loop = asyncio._get_running_loop()
    return getattr(loop, "name", "")


class _Run:
    """One cluster from its start to rest."""

    def __init__(self, surroundings: Surroundings, plan: Plan, slots: dict[str, Slot], faults: Faults) -> None:
        self._world = surroundings.world
        self._network = surroundings.network
        self._plan = plan
        self._slots = slots
        self._faults = faults
        self._redis = surroundings.redis
        self._security = surroundings.security
        self._spies: list[Spy] = []
        self._restarting: set[SimulatedProcess] = set()
        self._gateways = gateways = [address for address in slots if address.startswith("g")]
        self._clients = [
            SimulatedClient(
                self._world,
                self._network,
                request,
                gateways[request.gateway :] + gateways[: request.gateway],
                has_key=self._security is not None,
            )
            for request in plan.requests
        ]

    def run(self) -> None:
        for address, slot in self._slots.items():
            if not address.startswith("g"):
                slot.start()
        self._world.run_until(WORKERS_FIRST_S)
        for address, slot in self._slots.items():
            if address.startswith("g"):
                slot.start()
        for client in self._clients:
            self._world.schedule(client.loop, client.plan.at_s, client.start, ())
        for fault in self._plan.faults:
            self._faults.plan(fault)
        self._plan_withdrawal()
        while not all(client.is_done for client in self._clients):
            self._look_after(LOOK_S)
            if self._world.now > MAX_S:
                raise SimulationError(f"clients have no end after {MAX_S} s")
        for client in self._clients:
            check_end_of(client, self._clients, self._plan)
        check_keys(self._clients, self._plan)
        check_deaths(sum(process.died_of_step for process in self._all_workers()), self._plan)
        self._come_to_rest()

    def _plan_withdrawal(self) -> None:
        plan = self._plan.security
        if self._security is not None and plan is not None and plan.withdrawn:
            operator = self._world.new_loop("operator")
            self._world.schedule(operator, plan.withdrawn_at_s, self._security.withdraw, (plan.withdrawn,))

    def fill(self, outcome: Outcome) -> None:
        """Counts."""
        outcome.fired = self._faults.fired + self._fired_by_requests()
        outcome.num_requests = len(self._clients)
        outcome.num_succeeded = sum(client.succeeded for client in self._clients)
        outcome.num_attempts = CheckedLifecycle.num_attempts
        outcome.num_callbacks = self._world.num_callbacks
        for slot in self._slots.values():
            for process in (*slot.past, slot.process):
                if isinstance(process, GatewayProcess) and process.gateway is not None:
                    outcome.num_expected_tokens += process.gateway.sessions.routing.hits.num_expected.total()
        outcome.virtual_s = self._world.now
        received = [(client.request_id, [each.token_ids for each in client.received]) for client in self._clients]
        outcome.digest = (self._world.num_callbacks, self._world.now, repr(received))

    def _look_after(self, seconds: float) -> None:
        """Lets time pass, restarts what has died, and looks whether somebody waits too long."""
        self._world.run_until(self._world.now + seconds)
        if self._world.problems:
            raise ViolationError(self._world.problems.pop(0))
        for client in self._clients:
            client.check_in_time()
            self._look_at_credentials(client)
        for slot in self._slots.values():
            process = slot.process
            if not process.is_alive and not slot.is_gone and process not in self._restarting:
                self._restarting.add(process)
                slot.restart_after(self._world, RESTART_S)

    def _look_at_credentials(self, client: SimulatedClient) -> None:
        plan = self._plan.security
        if plan is None:
            return
        if client.plan.tenant == plan.withdrawn and not may_be_late(self._plan):
            client.check_withdrawn(plan.withdrawn_at_s)
        if client.request_id and not client.is_spied_on:
            client.is_spied_on = True
            workers = [address for address in self._slots if address.startswith("d")]
            spy = Spy(self._world, self._network, client.request_id, self._gateways, workers)
            self._spies.append(spy)
            spy.start()

    def _come_to_rest(self) -> None:
        give_up = max(self._world.now, self._faults.last_end) + REST_S
        while True:
            self._look_after(LOOK_S)
            leftovers = leftovers_of(self._processes()) + wrong_caches_of(self._processes())
            unwritten = self._unwritten()
            if not leftovers and not unwritten and self._world.now > self._faults.last_end:
                break
            if self._world.now > give_up:
                raise ViolationError(f"I3: at rest there are {leftovers + unwritten}")

    def _unwritten(self) -> list[str]:
        try:
            alive_ids = [process.instance_id for process in self._processes() if process.is_alive]
            check_store(self._redis, alive_ids, self._clients, may_lose_writes(self._plan))
        except ViolationError as violation:
            return [str(violation)]
        return []

    def _processes(self) -> Iterator[SimulatedProcess]:
        for slot in self._slots.values():
            yield slot.process

    def _fired_by_requests(self) -> Counter[Fault]:
        fired: Counter[Fault] = Counter()
        for client in self._clients:
            plan = client.plan
            fired[Fault.CLIENT_CANCELLED] += client.cancelled
            fired[Fault.DEADLINE] += type(client.error).__name__ == "DeadlineError"
            fired[Fault.SLOW_CLIENT] += client.num_pauses > 3
            fired[Fault.RESUMED_ELSEWHERE] += client.num_resumes > 0 and client.succeeded
            fired[Fault.POISON] += plan.is_poison and type(client.error).__name__ == "InternalError"
            fired[Fault.KEY_WITHDRAWN] += type(client.error).__name__ == "UnauthenticatedError"
            fired[Fault.QUOTA_EXCEEDED] += type(client.error).__name__ == "QuotaError"
            fired[Fault.NO_PLACE] += type(client.error).__name__ == "OverloadedError"
            fired[Fault.KEY_CONFLICT] += type(client.error).__name__ == "IdempotencyConflictError"
            same = [other for other in self._clients if other is not client and other.request_id == client.request_id]
            fired[Fault.SAME_KEY] += bool(client.request_id and same)
        fired[Fault.FOREIGN_ASKED] += sum(spy.num_refused for spy in self._spies)
        fired[Fault.STRANGER_AT_WORKER] += sum(spy.num_refused_by_workers for spy in self._spies)
        for slot in self._slots.values():
            for process in (*slot.past, slot.process):
                if isinstance(process, DecodeProcess):
                    fired[Fault.PREEMPTION] += process.scheduler.load().num_preemptions
        fired[Fault.KILLER] += sum(process.died_of_step for process in self._all_workers())
        return +fired

    def _all_workers(self) -> Iterator[SimulatedProcess]:
        for slot in self._slots.values():
            for process in (*slot.past, slot.process):
                if process.role is not MemberRole.GATEWAY:
                    yield process


def without_garbage_collection(call: Callable[[], Outcome]) -> Outcome:
    """Seeds make garbage in cycles, which is collected between them: faster, and at no odd moment."""
    gc.disable()
    try:
        return call()
    finally:
        gc.enable()
