"""One gateway without its servers: builds its parts and keeps its background tasks running."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from gateway.api.generation import Generation
from gateway.api.idempotency import IdempotencyKeys
from gateway.requests.admission import Admission, Bounds
from gateway.requests.cache_salts import CacheSalts
from gateway.requests.known_requests import KnownRequests
from gateway.requests.prompt_preparation import PromptPreparation
from gateway.requests.registry import RunningRequests
from gateway.requests.response_formats import ResponseFormats
from gateway.requests.runner import RunnerContext
from gateway.requests.shared_usage import SharedUsage
from gateway.requests.starter import RequestStarter
from gateway.resume.cancellation import Cancellation
from gateway.resume.stored_output import RequestOutputs
from gateway.resume.takeover import Takeovers
from gateway.resume.timeline_view import TimelineView
from gateway.routing.routing import Routing
from gateway.state.failure_detector import GatewayFailureDetector
from gateway.state.orphan_sweeper import OrphanSweeper
from gateway.state.other_gateways import OtherGateways
from gateway.state.writer import StateWriter
from gateway.streaming.write_throttle import WriteThrottle
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.timelines import Timelines
from gateway.text.chat_renderer import ChatRenderer
from gateway.text.texts import Texts
from gateway.workers.served_models import ServedModels
from gateway.workers.session import SessionSettings
from gateway.workers.sessions import WorkerSessions
from gateway.workers.tokenizer_cache import TokenizerCache
from gateway.workers.worker_trust import WorkerTrust
from kvrelay.config.settings import GatewaySettings
from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import KvrelayError
from kvrelay.observability.tracing import Tracing
from kvrelay.security.credentials import Towards, in_plain_text
from kvrelay.state.member_registry import MemberRegistry, MemberView
from kvrelay.state.state_store import StateStore
from kvrelay.structured_output.format_checks import FormatChecks

FIRST_LOOK_TIMEOUT_MS = 1000
LAST_WRITES_TIMEOUT_S = 2.0

_log = structlog.get_logger(__name__)


class Gateway:
    """Services take the parts that they need."""

    def __init__(
        self,
        gateway_id: str,
        settings: GatewaySettings,
        store: StateStore,
        registry: MemberRegistry,
        tracing: Tracing | None = None,
        towards: Towards = in_plain_text,
    ) -> None:
        self.gateway_id = gateway_id
        self.address = ""
        """host:port for other processes, once it listens."""
        self.settings = settings.requests
        self.store, self.registry = store, registry
        self._lease_ms = settings.server.lease_ms
        self._has_keys = settings.security.has_client_credentials
        self._members: MemberView | None = None
        self.requests = RunningRequests()
        self.sessions = WorkerSessions(
            _sessions_of(gateway_id, settings),
            on_event=self.requests.dispatch,
            on_lost=self.requests.on_worker_lost,
            on_death_confirmed=self.requests.on_death_confirmed,
            on_change=self._on_workers_changed,
            on_room=self.requests.on_room,
            towards=towards,
            trust=WorkerTrust(settings.peers.fingerprints),
            routing=Routing(settings.requests.routing, random.random),
        )
        self.models = ServedModels(self.sessions.views, self.members)
        self.chat_renderer = ChatRenderer()
        self.tokenizers = TokenizerCache(self.sessions.sessions, self.chat_renderer.pool.prestart)
        self._failure_detector = GatewayFailureDetector(gateway_id, towards)
        self.gateways = OtherGateways(gateway_id, self.members, self._failure_detector, towards)
        self.admission = Admission(_bounds(settings))
        self.metrics = GatewayMetrics()
        self.format_checks = FormatChecks()
        self.timelines = Timelines(self.settings.timeline_requests)
        self._writer = StateWriter(store, self.requests.supersede)
        self._salts = CacheSalts(settings.security.cache_secret())
        context = RunnerContext(
            self.settings, self.sessions, WriteThrottle(), self.metrics, self.timelines, self._salts, tracing
        )
        self.starter = RequestStarter(
            gateway_id, self.requests, self.admission, self.tokenizers, self._writer, context, settings.quotas
        )
        self.preparation = PromptPreparation(
            self.models,
            self.tokenizers,
            Texts(renderer=self.chat_renderer),
            ResponseFormats(self.format_checks, self.metrics, self.starter.take_format),
            self.settings.worker_wait_ms,
        )
        self.known_requests = KnownRequests(self.requests, store)
        self._takeovers = Takeovers(self.starter, self.preparation, self.requests, store)
        self.outputs = RequestOutputs(self.requests, self.known_requests, store, self.gateways, self._takeovers)
        keys = IdempotencyKeys(store, self.settings.retention_ms)
        self.generation = Generation(self.preparation, self.starter, self.outputs, keys)
        self.cancellation = Cancellation(self.known_requests, store, self.gateways)
        self.timeline_view = TimelineView(self.known_requests, self.timelines, self.gateways)

    @property
    def draining(self) -> bool:
        return self.starter.draining

    def drain(self) -> None:
        self.starter.draining = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """At the end it leaves running requests to other gateways."""
        async with (
            self.sessions.running(),
            self._failure_detector.running(),
            self.registry.watch(on_change=self._set_members) as members,
        ):
            self._members = members
            if not await members.wait_until_looked(FIRST_LOOK_TIMEOUT_MS):
                _log.warning(
                    "redis cannot be used: no worker can be found and no request state is kept until it can; "
                    "start it, or correct --redis-url",
                    cause=self.store.health.problem,
                )
            self._set_members(members.members())
            with contextlib.suppress(KvrelayError):  # the task below tries again
                await self._salts.share(self.store)
            sharing = asyncio.create_task(self._salts.keep_shared(self.store), name="cache secret")
            writing = asyncio.create_task(self._writer.run(), name="state writer")
            telling = asyncio.create_task(self._tell_usage(), name="usage of keys")
            sweeper = OrphanSweeper(self.store, self.gateway_id, self._gateway_ids, self._lease_ms)
            sweeping = asyncio.create_task(sweeper.run(), name="orphan sweeper")
            try:
                yield
            finally:
                self._takeovers.cancel_all()
                for runner in self.requests.running():
                    runner.release()
                for task in (writing, sweeping, sharing, telling):
                    task.cancel()
                await self.format_checks.close()
                await self.chat_renderer.close()
                await asyncio.wait([sweeping, sharing, telling])
                with contextlib.suppress(asyncio.CancelledError):
                    await writing
                await self._writer.drain(LAST_WRITES_TIMEOUT_S)

    async def _tell_usage(self) -> None:
        if self._has_keys:
            await SharedUsage(self.admission, self.store).run()

    def members(self, role: MemberRole | None = None) -> tuple[Member, ...]:
        """Processes with a lease, as last known."""
        return () if self._members is None else self._members.members(role)

    def _set_members(self, members: tuple[Member, ...]) -> None:
        self.sessions.set_members(members)
        self._failure_detector.set_members(members)

    def _gateway_ids(self) -> list[str]:
        return [member.instance_id for member in self.members(MemberRole.GATEWAY)]

    def _on_workers_changed(self) -> None:
        self.models.on_workers_changed()
        self.requests.on_workers_changed()


def _sessions_of(gateway_id: str, settings: GatewaySettings) -> SessionSettings:
    peers = settings.peers
    return SessionSettings(
        gateway_id, settings.server.liveness_window_ms, peers.session_move_ms, takes_unproven=peers.any_workers
    )


def _bounds(settings: GatewaySettings) -> Bounds:
    return Bounds(
        settings.requests.max_running_requests,
        settings.requests.max_queued_prompt_tokens,
        settings.quotas.max_waiting_requests,
        settings.requests.retention_ms / 1000,
    )
