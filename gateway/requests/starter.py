"""Admits new and taken over requests, and starts their runners."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from gateway.lifecycle.generation_request import GenerationRequest
from gateway.lifecycle.lifecycle import RequestLifecycle
from gateway.requests.admission import Admission, Admitted
from gateway.requests.caller import caller_of
from gateway.requests.key_limits import Caller
from gateway.requests.registry import RunningRequests
from gateway.requests.runner import RequestRunner, RunnerContext
from gateway.requests.tenants import current_session_key
from gateway.state.journal import RequestJournal, new_record
from gateway.state.writer import StateWriter
from gateway.streaming.output_log import RequestOutput
from gateway.text.detokenizer import Detokenizer
from gateway.workers.tokenizer_cache import TokenizerCache
from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.core.job import MAX_SHARE_WEIGHT, JobId
from kvrelay.core.trace_context import current_trace
from kvrelay.errors import OverloadedError, PreconditionError, QuotaError, UnavailableError
from kvrelay.security.principal import current_principal
from kvrelay.state.request_record import RequestRecord, stored_size

DRAINING_RETRY_MS = 1000
"""By then a load balancer has noticed, or a new gateway is up."""


class RequestStarter:
    def __init__(
        self,
        gateway_id: str,
        running: RunningRequests,
        admission: Admission,
        tokenizers: TokenizerCache,
        writer: StateWriter,
        context: RunnerContext,
        quotas: QuotaSettings,
    ) -> None:
        self.draining = False
        self._gateway_id = gateway_id
        self._running = running
        self._admission = admission
        self._tokenizers = tokenizers
        self._writer = writer
        self._context = context
        self._quotas = quotas

    def check_open(self) -> None:
        """Raises UnavailableError while draining, StoreFullError while Redis is full."""
        with self._context.metrics.counting_refusals():
            if self.draining:
                message = "this gateway is shutting down; send the request to another one, or again in a moment"
                raise UnavailableError(message, DRAINING_RETRY_MS)
            self._writer.check_room()

    def check_room(self, tenant: str = "") -> None:
        """Raises as `check_open`, QuotaError, and OverloadedError if there is no place now."""
        self.check_open()
        with self._context.metrics.counting_refusals():
            self._admission.check_room(self._caller(tenant), time.monotonic())

    def take_format(self) -> None:
        """Raises as `Admission.take_format`."""
        self._admission.take_format(self._caller(""), time.monotonic())

    @asynccontextmanager
    async def place(self, tenant: str, deadline: float) -> AsyncIterator[Admitted]:
        """Takes a place before anything is spent; `start` keeps it.

        Raises as `check_room`, perhaps after a wait for a place.
        """
        self.check_open()
        caller = self._caller(tenant)
        with self._context.metrics.counting_refusals():
            try:
                place = self._admission.take_place(caller, time.monotonic())
            except QuotaError:
                raise
            except OverloadedError:
                if not caller.waits:
                    raise
                place = await self._wait_for_place(caller, deadline)
        try:
            yield place
        finally:
            if not place.is_started:
                place.release(time.monotonic())

    async def _wait_for_place(self, caller: Caller, deadline: float) -> Admitted:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        waiting = self._admission.wait_for_place(caller, time.monotonic(), woken.set)
        try:
            async with asyncio.timeout_at(min(loop.time() + self._quotas.place_wait_ms / 1000, deadline)):
                await woken.wait()
        except TimeoutError:
            pass  # a place may have come at the same moment
        except BaseException:
            self._admission.withdraw(waiting, time.monotonic())
            raise
        if waiting.has_place:
            return self._admission.claim(waiting, time.monotonic())
        self._admission.withdraw(waiting, time.monotonic())
        raise self._admission.full_error()

    def start(self, request: GenerationRequest, place: Admitted) -> RequestRunner:
        """Raises:
        QuotaError, OverloadedError: too many prompt tokens wait.
        PreconditionError: stop strings need a tokenizer.
        UnavailableError, StoreFullError: as `check_open`.
        """
        self.check_open()
        if request.sampling.stop and self._tokenizers.cached(request.fingerprint) is None:
            raise PreconditionError("the model has no tokenizer, so stop strings cannot be found; use stop_token_ids")
        with self._context.metrics.counting_refusals():
            place.admit_prompt(len(request.prompt_token_ids))
        self._context.metrics.of_model(request.model).record_admitted(len(request.prompt_token_ids))
        request = replace(
            request,
            session_key=current_session_key(),
            cache_salt=self._context.salts.of(request.tenant),
            keeps_output=request.keeps_output or self._context.settings.keep_outputs,
        )
        journal = RequestJournal(
            new_record(request, self._gateway_id), RequestOutput(), request.deadline, trace=current_trace()
        )
        if place.counts_bytes:
            place.set_stored_bytes(stored_size(journal.record_to_create()))
        return self._run(request, place, journal)

    def _caller(self, tenant: str) -> Caller:
        return caller_of(current_principal(), tenant, self._context.settings, self._quotas)

    def continue_request(
        self, request: GenerationRequest, record: RequestRecord, output: RequestOutput
    ) -> RequestRunner:
        """`output` is what the store has."""
        caller, now = self._caller(request.tenant), time.monotonic()
        admitted = self._admission.admit_anyway(len(request.prompt_token_ids), caller, now)
        self._context.metrics.of_model(request.model).record_taken_over()
        request = replace(
            request,
            cache_salt=self._context.salts.of(request.tenant),
            attempt=record.attempt,
            emitted=tuple(map(tuple, output.emitted_token_ids(request.sampling.n))),
            finished_sequences=frozenset(output.finish_reasons()),
        )
        journal = RequestJournal(record, output, request.deadline, created=True, trace=current_trace())
        return self._run(request, admitted, journal)

    def _run(self, request: GenerationRequest, admitted: Admitted, journal: RequestJournal) -> RequestRunner:
        weight = min(max(current_principal().limits.weight, 1), MAX_SHARE_WEIGHT)
        request = replace(request, share_weight=weight)
        output = journal.output
        if not output.frames:
            assert request.sampling.seed is not None, "resolved by validation"
            output.append_accepted(
                request.request_id, request.model, len(request.prompt_token_ids), request.sampling.seed
            )
        lifecycle = RequestLifecycle(request, self._should_prefill_locally, self._context.settings.max_attempts)
        detokenizers = self._detokenizers(request, output)
        runner = RequestRunner(request, lifecycle, journal, detokenizers, admitted, self._context, self._on_ended)
        admitted.is_started = True
        self._running.add(runner)
        self._context.sessions.retry_budget.on_request()
        self._writer.track(journal)
        runner.start()
        return runner

    def _should_prefill_locally(
        self, job_id: JobId, decode_worker_id: str, prefill_worker_id: str, num_uncached_tokens: int
    ) -> bool:
        limit = self._context.settings.local_prefill_tokens
        if limit is not None:
            return num_uncached_tokens < limit
        return self._context.sessions.should_prefill_locally(
            job_id, decode_worker_id, prefill_worker_id, num_uncached_tokens
        )

    def _detokenizers(self, request: GenerationRequest, output: RequestOutput) -> list[Detokenizer] | None:
        """Returns detokenizers that have read what was emitted before."""
        tokenizer = self._tokenizers.cached(request.fingerprint)
        if tokenizer is None:
            return None
        prompt, stops = request.prompt_token_ids, request.sampling.stop
        emitted = output.emitted_token_ids(request.sampling.n)
        return [Detokenizer(tokenizer.token_texts, stops, prompt, token_ids) for token_ids in emitted]

    def _on_ended(self, runner: RequestRunner) -> None:
        self._running.on_ended(runner)
        self._context.timelines.on_ended(runner.request_id)
        self._writer.write_soon(runner.journal)
