"""Strikes the cluster with the faults of a plan, and counts those that had an effect."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from decode_worker.service import DecodeService
from kvrelay.core.job import Job, JobId
from kvrelay.core.member import MemberRole
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.kv_transfer.codec import Chunk, decode_request
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.wire.convert import reserve_to_pb, start_prefill_to_pb
from tests.simulation.environment import WallClock
from tests.simulation.network import Network
from tests.simulation.plan import Fault, FaultPlan
from tests.simulation.processes import SimulatedProcess, Slot, WorkerProcess
from tests.simulation.redis_model import RedisModel
from tests.simulation.toy_model import MODEL
from tests.simulation.virtual_time import World

PUSH_METHOD = "/kvrelay.v1.KVTransferService/Push"
_CHUNK_TAG = kv_transfer_pb2.PushRequest.CHUNK_FIELD_NUMBER << 3 | 2
_CHUNK_FAULTS = frozenset(
    {Fault.CHUNK_CORRUPT, Fault.CHUNK_REPLAYED, Fault.CHUNK_TRUNCATED, Fault.CHUNK_FOREIGN, Fault.CHUNK_LOST}
)
RESTART_AFTER_DRAIN_S = 1.8
MAX_REMEMBERED_CHUNKS = 8
STRANGER_ID = "gateway-stranger"


class Faults:
    """All that goes wrong with one cluster.

    Args:
        world, network, redis, wall_clock: what may be struck.
        slots: of the processes, by address.
    """

    def __init__(
        self, world: World, network: Network, redis: RedisModel, wall_clock: WallClock, slots: dict[str, Slot]
    ) -> None:
        self.fired: Counter[Fault] = Counter()
        self.last_end = 0.0
        """When the last fault is over."""
        self._world = world
        self._network = network
        self._redis = redis
        self._wall_clock = wall_clock
        self._slots = slots
        self._loop = world.new_loop("faults")
        self._armed: list[Fault] = []
        self.trace: Callable[[str], None] | None = None
        self._chunks: list[bytes] = []
        network.change_request = self._change_request

    def plan(self, fault: FaultPlan) -> None:
        """The fault strikes at its time."""
        self._at(fault.at_s, self._strike, fault)
        self.last_end = max(self.last_end, fault.at_s + fault.seconds)

    def _at(self, due: float, call: Callable[..., None], *arguments: Any) -> None:
        self._world.schedule(self._loop, due, call, arguments)

    def _strike(self, plan: FaultPlan) -> None:
        fault = plan.fault
        if self.trace is not None:
            self.trace(f"fault: {plan}")
        if fault in _CHUNK_FAULTS or fault is Fault.PUSH_BROKEN:
            self._armed.append(fault)
            return
        match fault:
            case Fault.PREFILL_KILLED:
                self._kill(plan, MemberRole.PREFILL)
            case Fault.DECODE_KILLED:
                self._kill(plan, MemberRole.DECODE)
            case Fault.GATEWAY_KILLED:
                self._kill(plan, MemberRole.GATEWAY)
            case Fault.SESSION_BROKEN:
                self._break_session(plan)
            case Fault.PARTITION | Fault.SHORT_PARTITION:
                self._close_direction(plan)
            case Fault.STALL | Fault.ZOMBIE:
                self._stop_for_a_while(plan)
            case Fault.WORKER_DRAINED | Fault.GATEWAY_DRAINED:
                self._drain(plan)
            case Fault.REQUEST_CLAIMED | Fault.REQUEST_TAKEN:
                self._claim_request(plan)
            case Fault.CLOCK_JUMPED:
                self._wall_clock.offset_s += 3600.0 if plan.target % 2 else -3600.0
                self.fired[fault] += 1
            case _:
                self._strike_redis(plan)

    # --- processes

    def _slots_of(self, *roles: MemberRole) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.process.role in roles and slot.process.is_alive]

    def _kill(self, plan: FaultPlan, role: MemberRole) -> None:
        slots = self._slots_of(role)
        if slots:
            slot = slots[plan.target % len(slots)]
            slot.is_gone = not plan.restarts
            slot.process.kill()
            self.fired[plan.fault] += 1

    def _drain(self, plan: FaultPlan) -> None:
        is_gateway = plan.fault is Fault.GATEWAY_DRAINED
        slots = self._slots_of(*([MemberRole.GATEWAY] if is_gateway else [MemberRole.PREFILL, MemberRole.DECODE]))
        slots = [slot for slot in slots if not slot.process.is_draining]
        if slots:
            slot = slots[plan.target % len(slots)]
            slot.is_gone = not plan.restarts
            slot.process.drain()
            self.fired[plan.fault] += 1

    def _stop_for_a_while(self, plan: FaultPlan) -> None:
        slots = [slot for slot in self._slots.values() if slot.process.is_alive and not slot.process.loop.is_stopped]
        if slots:
            process = slots[plan.target % len(slots)].process
            process.loop.stop_process()
            self._at(self._world.now + plan.seconds, process.loop.continue_process)
            self.fired[plan.fault] += 1

    # --- other gateways

    def _claim_request(self, plan: FaultPlan, num_looks: int = 200) -> None:
        """A stranger gives a worker a newer attempt of a request that runs there, and leaves."""
        workers = [slot.process for slot in self._slots_of(MemberRole.PREFILL, MemberRole.DECODE)]
        held = [
            (worker, job_id)
            for worker in workers
            if isinstance(worker, WorkerProcess)
            for job_id in worker.service.sessions.leases.jobs()
        ]
        if not held:
            if num_looks:
                self._at(self._world.now + 0.003, self._claim_request, plan, num_looks - 1)
            return
        worker, job_id = held[plan.target % len(held)]
        if plan.fault is Fault.REQUEST_TAKEN and not self._redis.give_away(job_id.request_id, STRANGER_ID):
            return
        stranger = Stranger()
        claimed = replace(job_id, attempt=job_id.attempt + (1, 2, 500, 1 << 19)[plan.target // 7 % 4])
        worker.loop.call_soon(stranger.claim, worker, claimed)
        leave = self._world.now + plan.seconds
        self._world.schedule(worker.loop, leave, _end_session, (worker, stranger))
        self.fired[plan.fault] += 1

    # --- the network

    def _pair(self, plan: FaultPlan) -> tuple[SimulatedProcess, SimulatedProcess] | None:
        """Two processes that have something to say to each other."""
        gateways = [slot.process for slot in self._slots_of(MemberRole.GATEWAY)]
        prefill = [slot.process for slot in self._slots_of(MemberRole.PREFILL)]
        decode = [slot.process for slot in self._slots_of(MemberRole.DECODE)]
        pairs = [(gateway, worker) for gateway in gateways for worker in prefill + decode]
        if plan.fault is not Fault.SESSION_BROKEN:
            pairs += [(sender, receiver) for sender in prefill for receiver in decode]
        return pairs[plan.target // 2 % len(pairs)] if pairs else None

    def _break_session(self, plan: FaultPlan) -> None:
        pair = self._pair(plan)
        if pair is not None and self._network.cut(pair[0].place, pair[1].address):
            self.fired[plan.fault] += 1

    def _close_direction(self, plan: FaultPlan) -> None:
        pair = self._pair(plan)
        if pair is None:
            return
        source, target = pair if plan.target % 2 else pair[::-1]

        def note() -> None:
            self.fired[plan.fault] += 1

        self._network.close_direction(source.address, target.address, plan.seconds, note)

    def _change_request(self, method: str, message: Any) -> list[Any]:
        """What arrives of a sender's message."""
        if method != PUSH_METHOD or message[0] != _CHUNK_TAG:
            return [message]
        fault = self._armed[0] if self._armed else None
        arriving = [message] if fault is None else self._change_chunk(fault, message)
        self._chunks = [*self._chunks[-MAX_REMEMBERED_CHUNKS:], message]
        return arriving

    def _change_chunk(self, fault: Fault, message: bytes) -> list[bytes]:
        arriving = [message]
        match fault:
            case Fault.CHUNK_CORRUPT:
                arriving = [message[:-1] + bytes((message[-1] ^ 0x10,))]
            case Fault.CHUNK_REPLAYED:
                arriving = [message, message]
            case Fault.CHUNK_TRUNCATED:
                arriving = [message[:-3]]
            case Fault.CHUNK_LOST:
                arriving = []
            case Fault.CHUNK_FOREIGN:
                foreign = [other for other in self._chunks if _could_be_taken_for(other, message)]
                if not foreign:
                    return arriving  # not yet
                arriving = [foreign[0]]
            case Fault.PUSH_BROKEN:
                self._break_pushes()
        self.fired[fault] += 1
        self._armed.pop(0)
        return arriving

    def _break_pushes(self) -> None:
        for sender in self._slots_of(MemberRole.PREFILL):
            for receiver in self._slots_of(MemberRole.DECODE):
                self._network.cut(sender.process.place, receiver.process.address)

    # --- Redis

    def _strike_redis(self, plan: FaultPlan) -> None:
        match plan.fault:
            case Fault.REDIS_AWAY:
                self._redis.is_away = True
                self._at(self._world.now + plan.seconds, setattr, self._redis, "is_away", False)
                self.fired[plan.fault] += 1
            case Fault.REDIS_FULL:
                self._redis.is_full = True
                self._at(self._world.now + plan.seconds, setattr, self._redis, "is_full", False)
                self.fired[plan.fault] += 1
            case Fault.REDIS_LOST_WRITES:
                self._redis.keep()
                self._at(self._world.now + 0.15, self._lose_writes)

    def _lose_writes(self) -> None:
        before = self._redis.data
        self._redis.fall_back()
        if (before.hashes, before.logs) != (self._redis.data.hashes, self._redis.data.logs):
            self.fired[Fault.REDIS_LOST_WRITES] += 1


class Stranger:
    """A gateway outside of the cluster. It reads nothing of what it is sent."""

    def __init__(self) -> None:
        self.gateway_id = STRANGER_ID

    def send(self, **message: Any) -> None:
        """Reads nothing."""

    def claim(self, worker: WorkerProcess, job_id: JobId) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=4, seed=1)
        job = Job(job_id, (1, 2), 2, 1, sampling, "", 30_000)
        if isinstance(worker.service, DecodeService):
            worker.service.handle_command(self, "reserve", reserve_to_pb(job, MODEL.fingerprint))
        else:
            worker.service.handle_command(self, "start_prefill", start_prefill_to_pb(job, bytes(16), "nowhere:1", 0))


def _end_session(worker: WorkerProcess, stranger: Stranger) -> None:
    worker.service.sessions.end_jobs_of(stranger)


def _could_be_taken_for(other: bytes, message: bytes) -> bool:
    """Whether only ticket and payload tell a chunk from another."""
    if other == message or len(other) != len(message):
        return False
    first, second = decode_request(other), decode_request(message)
    return isinstance(first, Chunk) and isinstance(second, Chunk) and first.span == second.span
