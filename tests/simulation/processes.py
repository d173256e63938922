"""The processes of a simulated cluster, each put together from production code as its `main` does
it.

A process is started, killed, stopped, continued and drained from outside, like a real one. After a
restart it is another instance under the same address.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from tokenizers import Tokenizer, models, pre_tokenizers

from decode_worker.commands import Command as DecodeCommand
from decode_worker.engine_loop import DecodeEngineLoop
from decode_worker.kv_receiver import KVReceiver, ReceiverContext
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.events import StepReport
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from decode_worker.scheduling.speculation import SpeculationLimits
from decode_worker.service import DecodeService
from gateway.gateway import Gateway
from gateway.requests.cache_salts import CacheSalts
from gateway.service import InferenceService
from gateway.text.token_text import TokenTexts
from kvrelay.config.settings import GatewaySettings
from kvrelay.core.job import Job, JobId
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import PreconditionError
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.kv_transfer.registered_receivers import RegisteredReceivers
from kvrelay.kv_transfer.transports import GrpcTransport
from kvrelay.security.principal import Role
from kvrelay.security.process_security import POLL_INTERVAL_S
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.registered_peers import RegisteredPeers
from kvrelay.state.request_owners import RequestOwners
from kvrelay.state.state_store import StateStore
from kvrelay.v1 import decode_pb2_grpc, inference_pb2_grpc, prefill_pb2_grpc, session_pb2
from kvrelay.wire.convert import model_to_pb
from kvrelay.worker.step import Step
from kvrelay.worker.step_runner import StepRunner
from prefill_worker.commands import Command as PrefillCommand
from prefill_worker.engine_loop import PrefillEngineLoop
from prefill_worker.kv_sender import SenderContext
from prefill_worker.scheduling.scheduler import PrefillLimits, PrefillScheduler
from prefill_worker.service import PrefillService
from tests.simulation.network import Network, Place
from tests.simulation.redis_model import RedisModel, SimulatedRedisConnection
from tests.simulation.security import LoadedKeys, SimulatedSecurity, certificate_of, guard_of
from tests.simulation.threads import SimulatedEngineThread, SimulatedThreads
from tests.simulation.toy_model import MODEL, NUM_LAYERS, VOCAB_SIZE, ToyPool, ToyStepRunner
from tests.simulation.virtual_time import ProcessDiedError, World

DRAIN_TIMEOUT_MS = 1500
LEASE_MS = 1500
MAX_INBOX = 64


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What a seed draws for a worker."""

    num_blocks: int
    block_size: int
    chunk_tokens: int
    max_sequences: int
    max_waiting_works: int
    caches_prefixes: bool
    max_draft_tokens: int
    shared_chunk_tokens: int | None
    step_s: float
    """How long a step takes, about."""
    message_bytes: int
    """Largest payload of a chunk on the wire."""
    slow_jobs: float
    """Share of its threads' jobs that get no core for a while."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all processes of a cluster share."""

    world: World
    network: Network
    redis: RedisModel
    security: SimulatedSecurity | None = None
    """None: every caller is let in."""

    def connection(self) -> RedisConnection:
        return cast(RedisConnection, SimulatedRedisConnection(self.redis, self.world))


class SimulatedProcess:
    """One process at an address.

    Args:
        surroundings: of the cluster.
        role: what it does.
        address: host:port.
    """

    def __init__(self, surroundings: Surroundings, role: MemberRole, address: str) -> None:
        self.surroundings = surroundings
        self.role = role
        self.address = address
        self.instance_id = f"{role.value}-{secrets.token_hex(4)}"
        self.loop = surroundings.world.new_loop(f"{address} {self.instance_id}")
        self.place = Place(self.loop, address)
        self.keys: LoadedKeys | None = None
        """A gateway's of its clients."""
        if surroundings.security is not None:
            own_role = Role(role.value)
            self.keys = LoadedKeys(surroundings.security) if own_role is Role.GATEWAY else None
            self.place.guard = guard_of(own_role, self.keys)
            self.place.certificate = certificate_of(own_role)
        self.stop = asyncio.Event()
        self.is_draining = False
        self.has_ended = False
        self.died_of_step = False
        """A prompt has killed it."""
        self.loop.place = self.place  # type: ignore[attr-defined]

    def start(self) -> None:
        self.loop.spawn(self._main(), f"main of {self.address}")

    async def _main(self) -> None:
        raise NotImplementedError

    @property
    def is_alive(self) -> bool:
        return not self.loop.is_dead and not self.has_ended

    def kill(self) -> None:
        """As SIGKILL does."""
        if not self.is_alive:
            return
        self.loop.kill()
        self.surroundings.network.process_died(self.place)

    def drain(self) -> None:
        """As SIGTERM does."""
        self.is_draining = True
        self.loop.call_soon(self.stop.set)

    def leftovers(self) -> list[str]:
        """What the process still holds of requests; nothing when it is at rest."""
        raise NotImplementedError

    async def _end(self) -> None:
        """Streams get a moment for their last messages, then the process is gone."""
        self.surroundings.network.stop_listening(self.place)
        await asyncio.sleep(0.1)
        self.has_ended = True
        self.loop.kill()
        self.surroundings.network.process_died(self.place)


class WorkerProcess(SimulatedProcess):
    """What both kinds of worker have in common.

    Args:
        surroundings, address: as any process.
        role: which kind.
        shape: of its engine.
    """

    def __init__(self, surroundings: Surroundings, role: MemberRole, address: str, shape: WorkerShape) -> None:
        super().__init__(surroundings, role, address)
        self.shape = shape
        self.blocks = BlockManager(shape.num_blocks, shape.block_size, shape.caches_prefixes)
        self.pool = ToyPool(shape.num_blocks, shape.block_size)
        self.threads = SimulatedThreads(self.loop, shape.slow_jobs)
        self.step_runner = cast(StepRunner, ToyStepRunner(self.pool, self._compute_layer, self._die))
        self.max_sequence_tokens = min(MODEL.max_context_tokens, shape.num_blocks * shape.block_size)
        self.service: DecodeService | PrefillService
        self.thread: SimulatedEngineThread[Any]

    async def _main(self) -> None:
        member = Member(self.instance_id, self.role, self.address, MODEL.name, MODEL.fingerprint)
        self.thread.start()
        self.surroundings.network.listen(self.place)
        async with MemberRegistry(self.surroundings.connection(), LEASE_MS).lease(member):
            await self.stop.wait()
            await self.service.sessions.drain(DRAIN_TIMEOUT_MS)
        await self._end()

    def hello(self) -> session_pb2.WorkerHello:
        return session_pb2.WorkerHello(
            worker_id=self.instance_id,
            protocol_version=PROTOCOL_VERSION,
            model=model_to_pb(MODEL),
            block_size=self.shape.block_size,
            max_sequence_tokens=self.max_sequence_tokens,
        )

    def leftovers(self) -> list[str]:
        """Also checks the block manager."""
        self.blocks.check_integrity()
        held = {
            "used blocks": self.blocks.num_used_blocks,
            "leases": len(self.service.sessions.leases),
            "engine jobs": len(self._job_ids()),
            "waiting commands": 0 if self.thread.is_idle else 1,
        }
        return [f"{self.loop.name}: {number} {name}" for name, number in held.items() if number]

    def _job_ids(self) -> list[JobId]:
        raise NotImplementedError

    def _die(self) -> None:
        self.died_of_step = True
        self.kill()
        raise ProcessDiedError

    def _compute_layer(self, step: Step) -> None:
        """The others go on meanwhile."""
        world = self.surroundings.world
        num_tokens = sum(entry.num_tokens for entry in step.entries)
        seconds = self.shape.step_s * (1 + num_tokens / 16) * world.random.uniform(0.5, 1.5) / NUM_LAYERS
        world.run_until(world.now + seconds)
        while self.loop.is_stopped and not self.loop.is_dead:
            world.run_until(world.now + 0.02)
        if self.loop.is_dead:
            raise ProcessDiedError


class RecordingGrants(WriteGrants):
    """Tells the pool whose the blocks of a reservation are."""

    def __init__(self, pool: ToyPool) -> None:
        super().__init__()
        self._pool = pool

    def grant(self, job: Job, block_ids: tuple[int, ...], token_begin: int) -> bytes:
        self._pool.note_reserved(job.job_id, block_ids)
        return super().grant(job, block_ids, token_begin)


class DecodeProcess(WorkerProcess):
    """A decode worker."""

    def __init__(self, surroundings: Surroundings, address: str, shape: WorkerShape) -> None:
        super().__init__(surroundings, MemberRole.DECODE, address, shape)
        self.grants = RecordingGrants(self.pool)
        limits = DecodeLimits(
            shape.chunk_tokens, shape.max_sequences, shape.max_waiting_works, shape.shared_chunk_tokens
        )
        speculation = None
        if shape.max_draft_tokens:
            speculation = SpeculationLimits(shape.max_draft_tokens, 16, self.max_sequence_tokens)
        self.scheduler = DecodeScheduler(self.blocks, limits, self.grants, speculation)
        self.pool.is_held_for = lambda job_id: job_id in self.scheduler.job_ids()
        engine_loop = DecodeEngineLoop(self.scheduler, self.step_runner, self.grants, self._publish, now=self.loop.time)
        self.thread: SimulatedEngineThread[DecodeCommand] = SimulatedEngineThread(self.loop, engine_loop, MAX_INBOX)
        pool = self.pool
        receiver = KVReceiver(ReceiverContext(pool, MODEL, self.grants, self.threads, self.thread.submit))
        self.service: DecodeService = DecodeService(
            self.hello(), MODEL, address, self.thread, owners=RequestOwners(surroundings.connection())
        )
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self.service, cast(Any, self.place))
        receiver.add_to(cast(Any, self.place))

    def leftovers(self) -> list[str]:
        grants = [f"{self.loop.name}: {len(self.grants)} grants"] if len(self.grants) else []
        return super().leftovers() + grants

    def _publish(self, report: StepReport) -> None:
        self.loop.call_soon(self.service.report, report)

    def _job_ids(self) -> list[JobId]:
        return self.scheduler.job_ids()


class PrefillProcess(WorkerProcess):
    """A prefill worker."""

    def __init__(self, surroundings: Surroundings, address: str, shape: WorkerShape) -> None:
        super().__init__(surroundings, MemberRole.PREFILL, address, shape)
        limits = PrefillLimits(shape.chunk_tokens, shape.max_waiting_works)
        self.scheduler = PrefillScheduler(self.blocks, MODEL, limits)
        engine_loop = PrefillEngineLoop(
            self.scheduler, self.step_runner, self._publish, self._announce, now=self.loop.time
        )
        self.thread: SimulatedEngineThread[PrefillCommand] = SimulatedEngineThread(self.loop, engine_loop, MAX_INBOX)
        peers = RegisteredPeers(MemberRegistry(surroundings.connection(), LEASE_MS))
        context = SenderContext(
            exporter=self.pool,
            layout=MODEL.kv_layout,
            transport=RegisteredReceivers(
                GrpcTransport(connect_timeout_ms=500, max_payload_bytes=shape.message_bytes),
                lambda address: peers.is_registered(MemberRole.DECODE, address),
            ),
            threads=self.threads,
            max_message_bytes=shape.message_bytes,
            max_window_bytes=3 * shape.message_bytes,
            now=self.loop.time,
        )
        self.service: PrefillService = PrefillService(
            self.hello(), MODEL, context, self.thread, owners=RequestOwners(surroundings.connection())
        )
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self.service, cast(Any, self.place))

    def leftovers(self) -> list[str]:
        num_senders = self.service.num_senders
        return super().leftovers() + ([f"{self.loop.name}: {num_senders} senders"] if num_senders else [])

    def _publish(self, report: Any) -> None:
        self.loop.call_soon(self.service.report, report)

    def _announce(self, layer: int, written: Any) -> None:
        self.loop.call_soon(self.service.announce, layer, written)

    def _job_ids(self) -> list[JobId]:
        return self.scheduler.job_ids()


class ToySalts(CacheSalts):
    """Tenants as they are: the toy model's tokens depend on the salt, so clients must know it."""

    def of(self, tenant: str) -> str:
        """The tenant."""
        return tenant


class GatewayProcess(SimulatedProcess):
    """A gateway.

    Args:
        surroundings, address: as any process.
        settings: of the gateway.
    """

    def __init__(self, surroundings: Surroundings, address: str, settings: GatewaySettings) -> None:
        super().__init__(surroundings, MemberRole.GATEWAY, address)
        self._settings = settings
        self.gateway: Gateway | None = None
        """None until it runs."""

    async def _main(self) -> None:
        connection = self.surroundings.connection()
        store = StateStore(connection, self.instance_id, self._settings.requests.retention_ms)
        self.gateway = gateway = Gateway(self.instance_id, self._settings, store, MemberRegistry(connection, LEASE_MS))
        gateway.address = self.address
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(gateway), cast(Any, self.place))
        member = Member(self.instance_id, MemberRole.GATEWAY, self.address)
        watching = asyncio.create_task(self._watch_keys(), name="watch of the credentials")
        async with gateway.running(), gateway.registry.lease(member):
            self.surroundings.network.listen(self.place)
            await self.stop.wait()
            gateway.drain()
            await gateway.requests.wait_until_idle(DRAIN_TIMEOUT_MS / 1000)
        watching.cancel()
        await self._end()

    async def _watch_keys(self) -> None:
        while self.keys is not None and self.place.guard is not None:
            await asyncio.sleep(POLL_INTERVAL_S)
            if self.keys.poll():
                self.place.guard.end_withdrawn()

    def leftovers(self) -> list[str]:
        if self.gateway is None:
            return []
        usages = self.gateway.admission._keys.values()
        held = {
            "running requests": len(self.gateway.requests.running()),
            "admitted requests": self.gateway.admission.num_running_requests,
            "queued prompt tokens": self.gateway.admission.num_queued_prompt_tokens,
            "requests that wait for a place": self.gateway.admission.num_waiting_for_place,
            "requests in progress of keys": sum(usage.num_running for usage in usages),
            "queued prompt tokens of keys": sum(usage.num_queued_tokens for usage in usages),
            "requests of keys without a client": sum(usage.num_unattended for usage in usages),
        }
        return [f"{self.loop.name}: {number} {name}" for name, number in held.items() if number]


class ToyTokenizers:
    """A tokenizer cache with one tokenizer, whose every token is a word."""

    def __init__(self, sessions: object, on_template: object) -> None:
        tokenizer = Tokenizer(
            models.WordLevel({word_of(token_id): token_id for token_id in range(VOCAB_SIZE)}, unk_token="w00")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self._tokenizer = SimpleNamespace(tokenizer=tokenizer, token_texts=TokenTexts(tokenizer), template=None)

    def cached(self, fingerprint: str) -> Any:
        return self._tokenizer if fingerprint == MODEL.fingerprint else None

    async def get(self, fingerprint: str) -> Any:
        if fingerprint != MODEL.fingerprint:
            raise PreconditionError("an unknown model")
        return self._tokenizer


def word_of(token_id: int) -> str:
    """The text of a token."""
    return f"w{token_id:02}"


Factory = Callable[[], SimulatedProcess]


class Slot:
    """An address at which processes follow one another.

    Args:
        make: a new process for the address.
    """

    def __init__(self, make: Factory) -> None:
        self._make = make
        self.process = make()
        self.past: list[SimulatedProcess] = []
        self.is_gone = False
        """No process follows any more."""

    def start(self) -> None:
        self.process.start()

    def restart_after(self, world: World, seconds: float) -> None:
        """Another process comes in so many seconds."""
        world.schedule(world.new_loop("supervisor"), world.now + seconds, self._restart, ())

    def _restart(self) -> None:
        if self.process.is_alive:  # still draining: it is given up
            self.process.kill()
        self.past.append(self.process)
        self.process = self._make()
        self.process.start()


def slots_of(
    surroundings: Surroundings,
    settings: GatewaySettings,
    num_gateways: int,
    prefill: list[WorkerShape],
    decode: list[WorkerShape],
) -> dict[str, Slot]:
    """All slots of a cluster, by address."""
    makers: dict[str, Factory] = {}
    for number in range(num_gateways):
        makers[f"g{number}:1"] = partial(GatewayProcess, surroundings, f"g{number}:1", settings)
    for number, shape in enumerate(prefill):
        makers[f"p{number}:1"] = partial(PrefillProcess, surroundings, f"p{number}:1", shape)
    for number, shape in enumerate(decode):
        makers[f"d{number}:1"] = partial(DecodeProcess, surroundings, f"d{number}:1", shape)
    return {address: Slot(make) for address, make in makers.items()}
