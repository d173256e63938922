"""All that a gateway's handlers share: workers, models, bounds, running requests and the store. Starts requests; serves none."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from gateway.admission import Admission, Admitted
from gateway.detokenizer import Detokenizer
from gateway.generation_request import GenerationRequest
from gateway.lifecycle_messages import LifecycleRequest
from gateway.metrics import GatewayMetrics
from gateway.orphan_sweeper import OrphanSweeper
from gateway.peers import GatewayPeers
from gateway.request_journal import RequestJournal
from gateway.request_lifecycle import RequestLifecycle
from gateway.request_output import RequestOutput
from gateway.request_runner import RequestRunner
from gateway.request_trace import RequestTrace
from gateway.running_requests import RunningRequests
from gateway.served_models import ServedModels
from gateway.state_writer import StateWriter
from gateway.timelines import Timelines
from gateway.tokenizer_cache import TokenizerCache
from gateway.turnstile import Turnstile
from gateway.worker_session import SessionSettings
from gateway.worker_sessions import WorkerSessions
from kvrelay.config import GatewaySettings
from kvrelay.errors import PreconditionError, UnavailableError
from kvrelay.form_compiler import FormCompiler
from kvrelay.grammar import check_form
from kvrelay.request_record import RequestRecord
from kvrelay.request_state import RequestState
from kvrelay.state_store import StateStore
from kvrelay.trace_context import current_trace
from kvrelay.tracing import Tracing
from kvrelay.work import WorkId
from kvrelay.worker_registry import Member, MemberRole, MemberView, WorkerRegistry

FIRST_LOOK_TIMEOUT_MS = 1000
LAST_WRITES_TIMEOUT_S = 2.0
DRAINING_RETRY_MS = 1000
"""When a client may ask again that a draining gateway refused: by then a load balancer has noticed, or a new gateway is up."""

_log = structlog.get_logger(__name__)


class Relay:
    """One gateway without its servers.

    Args:
        gateway_id: instance id, new with every start.
        settings: of the gateway.
        store: request state.
        registry: who is alive.
        tracing: where spans go; None traces nothing.
    """

    def __init__(
        self,
        gateway_id: str,
        settings: GatewaySettings,
        store: StateStore,
        registry: WorkerRegistry,
        tracing: Tracing | None = None,
    ) -> None:
        self.gateway_id = gateway_id
        self.address = ""
        """host:port under which others reach this gateway; known once it listens."""
        self.settings = settings.relay
        self.store = store
        self.draining = False
        self.requests = RunningRequests()
        self.admission = Admission(self.settings.max_running_requests, self.settings.max_queued_prompt_tokens)
        self.sessions = WorkerSessions(
            SessionSettings(gateway_id, settings.server.liveness_window_ms),
            on_event=self.requests.dispatch,
            on_lost=self.requests.note_worker_lost,
            on_fate=self.requests.note_worker_fate,
            on_change=self._note_workers_changed,
            on_room=self.requests.note_room,
        )
        self.peers = GatewayPeers(gateway_id)
        self.models = ServedModels(self.sessions.views, self.members)
        self.tokenizers = TokenizerCache(self.sessions.sessions)
        self.forms: FormCompiler[None] = FormCompiler(check_form)
        """Whether response formats can be compiled."""
        self.takeovers: dict[str, asyncio.Future[RequestRunner | None]] = {}
        """Requests that are just being taken over, so that each is once."""
        self.timelines = Timelines(self.settings.timeline_requests)
        self.metrics = GatewayMetrics()
        self.turnstile = Turnstile()
        self.writer = StateWriter(store, self.requests.supersede)
        self.registry = registry
        self._tracing = tracing
        self._lease_ms = settings.server.lease_ms
        self._members: MemberView | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps sessions and writes state; at the end leaves what still runs to other gateways, and writes what is left."""
        async with self.sessions.running(), self.peers.running(), self.registry.watch(on_change=self._note_members) as members:
            self._members = members
            if not await members.wait_until_looked(FIRST_LOOK_TIMEOUT_MS):
                _log.warning(
                    "redis does not answer: no worker can be found and no request state is kept until it does; "
                    "start it, or correct --redis-url"
                )
            self._note_members(members.members())
            writing = asyncio.create_task(self.writer.run(), name="state writer")
            sweeper = OrphanSweeper(self.store, self.gateway_id, self._gateway_ids, self._lease_ms)
            sweeping = asyncio.create_task(sweeper.run(), name="orphan sweeper")
            try:
                yield
            finally:
                for takeover in self.takeovers.values():
                    takeover.cancel()
                for runner in self.requests.running():
                    runner.release()
                writing.cancel()
                sweeping.cancel()
                await asyncio.wait([sweeping])
                with contextlib.suppress(asyncio.CancelledError):
                    await writing
                await self.writer.drain(LAST_WRITES_TIMEOUT_S)

    def members(self, role: MemberRole | None = None) -> tuple[Member, ...]:
        """Processes with a lease, as last known."""
        return () if self._members is None else self._members.members(role)

    def _note_members(self, members: tuple[Member, ...]) -> None:
        self.sessions.set_members(members)
        self.peers.set_members(members)

    def _gateway_ids(self) -> list[str]:
        return [member.instance_id for member in self.members(MemberRole.GATEWAY)]

    def check_open(self) -> None:
        """Raises UnavailableError while the gateway takes no new requests, StoreFullError while their state could not be kept."""
        with self.metrics.noting_refusals():
            if self.draining:
                message = "this gateway is shutting down; send the request to another one, or again in a moment"
                raise UnavailableError(message, DRAINING_RETRY_MS)
            self.writer.check_room()

    def check_room(self) -> None:
        """Raises OverloadedError while no new request would be admitted: to be asked before its prompt is tokenized."""
        with self.metrics.noting_refusals():
            self.admission.check_room()

    def start(self, request: GenerationRequest) -> RequestRunner:
        """Admits a request and starts it.

        Raises:
            OverloadedError: too much is in progress.
            UnavailableError: the gateway is shutting down.
        """
        self.check_open()
        if request.sampling.stop and self.tokenizers.cached(request.fingerprint) is None:
            raise PreconditionError("the model has no tokenizer, so stop strings cannot be found; use stop_token_ids")
        with self.metrics.noting_refusals():
            admitted = self.admission.admit(len(request.prompt_token_ids), time.monotonic())
        self.metrics.of_model(request.model).note_admitted(len(request.prompt_token_ids))
        lifecycle_request = LifecycleRequest(request.request_id, request.prompt_token_ids, request.sampling, request.cache_salt)
        journal = RequestJournal(self._new_record(request), RequestOutput(), request.deadline, trace=current_trace())
        return self._run(request, admitted, lifecycle_request, journal)

    def continue_request(self, request: GenerationRequest, record: RequestRecord, output: RequestOutput) -> RequestRunner:
        """Continues a request that was taken over from a dead gateway, at the next index. `output` is what the store has."""
        emitted = output.emitted_token_ids(request.sampling.n)
        lifecycle_request = LifecycleRequest(
            request.request_id,
            request.prompt_token_ids,
            request.sampling,
            request.cache_salt,
            record.attempt,
            tuple(tuple(ids) for ids in emitted),
            frozenset(output.finish_reasons()),
        )
        admitted = self.admission.admit_anyway(len(request.prompt_token_ids), time.monotonic())
        self.metrics.of_model(request.model).note_taken_over()
        journal = RequestJournal(record, output, request.deadline, created=True, trace=current_trace())
        return self._run(request, admitted, lifecycle_request, journal)

    def _run(
        self, request: GenerationRequest, admitted: Admitted, lifecycle_request: LifecycleRequest, journal: RequestJournal
    ) -> RequestRunner:
        num_tokens_before = tuple(len(token_ids) for token_ids in lifecycle_request.emitted)
        runner = RequestRunner(
            request,
            lifecycle=RequestLifecycle(lifecycle_request, self._is_local_prompt, self.settings.max_attempts),
            output=journal.output,
            detokenizers=self._detokenizers(request, journal.output),
            journal=journal,
            timeline=self.timelines.begin(request.request_id, request.submit_time, num_tokens_before),
            admitted=admitted,
            sessions=self.sessions,
            settings=self.settings,
            turnstile=self.turnstile,
            on_end=self._note_ended,
            metrics=self.metrics.of_model(request.model),
            trace=RequestTrace(request.request_id, current_trace(), self._tracing),
        )
        if not journal.output.frames:
            seed = request.sampling.seed
            assert seed is not None, "resolved by validation"
            journal.output.append_accepted(request.request_id, request.model, len(request.prompt_token_ids), seed)
        self.requests.add(runner)
        self.sessions.retries.note_request()
        self.writer.track(journal)
        runner.start()
        return runner

    def _is_local_prompt(self, work_id: WorkId, decode_worker_id: str, prefill_worker_id: str, num_uncached_tokens: int) -> bool:
        limit = self.settings.local_prefill_tokens
        if limit is not None:
            return num_uncached_tokens < limit
        return self.sessions.place_prompt(work_id, decode_worker_id, prefill_worker_id, num_uncached_tokens)

    def _detokenizers(self, request: GenerationRequest, output: RequestOutput) -> list[Detokenizer] | None:
        tokenizer = self.tokenizers.cached(request.fingerprint)
        if tokenizer is None:
            return None
        made = []
        for token_ids in output.emitted_token_ids(request.sampling.n):
            detokenizer = Detokenizer(tokenizer.tokenizer, request.sampling.stop, request.prompt_token_ids)
            for token_id in token_ids:
                detokenizer.add(token_id)
            made.append(detokenizer)
        return made

    def _new_record(self, request: GenerationRequest) -> RequestRecord:
        now_ms = int(time.time() * 1000)
        remaining_ms = max(int((request.deadline - time.monotonic()) * 1000), 1)
        return RequestRecord(
            request_id=request.request_id,
            state=RequestState.QUEUED,
            attempt=1,
            tenant=request.tenant,
            model=request.model,
            gateway_id=self.gateway_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            create_time_ms=now_ms,
            update_time_ms=now_ms,
            deadline_time_ms=now_ms + remaining_ms,
            remaining_ms=remaining_ms,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            cache_salt=request.cache_salt,
            resumable=request.resumable,
        )

    def _note_ended(self, runner: RequestRunner) -> None:
        self.requests.note_ended(runner)
        self.timelines.note_ended(runner.request_id)
        self.writer.write_soon(runner.journal)

    def _note_workers_changed(self) -> None:
        self.models.note_workers_changed()
        self.requests.note_workers_changed()


def new_request_id() -> str:
    """32 hexadecimal digits that nobody can guess."""
    return secrets.token_hex(16)
