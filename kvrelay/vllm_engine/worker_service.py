"""VllmEngine on both kinds of workers, for smg in its prefill-decode mode, without our gateway.

Workers report vLLM's NixlConnector. With it smg asks the prefill worker for one token with
`do_remote_decode`, and passes its answer unchanged to the decode worker.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kvrelay
from kvrelay.core.bounds import check_count
from kvrelay.core.job import FailureKind, Job, JobId
from kvrelay.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    KvrelayError,
    OverloadedError,
    TransferError,
    UnavailableError,
    UnsupportedError,
)
from kvrelay.vllm_engine.client_ids import MAX_ABORTED, check_client_id
from kvrelay.vllm_engine.local_session import LocalSessions
from kvrelay.vllm_engine.messages import Message, engine_pb
from kvrelay.vllm_engine.partial_service import Context, PartialVllmEngine
from kvrelay.vllm_engine.sampling import defaults_json, sampling_from_vllm, with_room
from kvrelay.vllm_engine.served_engine import ServedEngine
from kvrelay.vllm_engine.tokenizer_bundle import TokenizerDownloads
from kvrelay.wire.convert import failure_kind_from_pb, with_model_defaults
from kvrelay.worker.gateway_sessions import GatewaySessions
from kvrelay.worker.tokenizer_service import tokenizer_files

CONNECTOR = "NixlConnector"
DEFAULT_TIMEOUT_S = 300.0
"""Deadline of requests without one. smg sets none."""
_ERRORS: dict[FailureKind, Callable[[str], KvrelayError]] = {
    FailureKind.OUT_OF_CAPACITY: OverloadedError,
    FailureKind.TRANSFER: TransferError,
    FailureKind.DRAINING: UnavailableError,
    FailureKind.INVALID: lambda message: InvalidRequestError("request", message),
    FailureKind.DEADLINE: DeadlineError,
}


class WorkerVllmEngine(PartialVllmEngine):
    """`generate` answers a request, given its first attempt's job."""

    def __init__(
        self,
        engine: ServedEngine,
        sessions: GatewaySessions,
        local_sessions: LocalSessions,
        generate: Callable[[Message, Job], AsyncIterator[Message]],
    ) -> None:
        self._engine = engine
        self._sessions = sessions
        self._local_sessions = local_sessions
        self._generate = generate
        self._started_at = time.monotonic()
        self._tokenizer = TokenizerDownloads(self._files)

    async def Generate(self, request: Message, context: Context) -> AsyncIterator[Message]:
        async for message in self._generate(request, self._job_of(request, context)):
            yield message

    async def Abort(self, request: Message, context: Context) -> Message:
        check_count("request_ids", request.request_ids, MAX_ABORTED)
        for request_id in request.request_ids:
            self._local_sessions.abort(request_id)
        return engine_pb.AbortResponse()

    async def HealthCheck(self, request: Message, context: Context) -> Message:
        if self._sessions.draining:
            return engine_pb.HealthCheckResponse(healthy=False, message="this worker is shutting down")
        return engine_pb.HealthCheckResponse(healthy=True, message="serving")

    async def GetModelInfo(self, request: Message, context: Context) -> Message:
        model = self._engine.model
        return engine_pb.GetModelInfoResponse(
            model_path=model.name,
            served_model_name=model.name,
            is_generation=True,
            max_context_length=self._engine.max_tokens,
            max_req_input_len=self._engine.max_tokens - 1,
            vocab_size=model.vocab_size,
            model_type=model.architecture,
            eos_token_ids=model.eos_token_ids,
            default_sampling_params_json=defaults_json(model),
        )

    async def GetServerInfo(self, request: Message, context: Context) -> Message:
        engine = self._engine
        return engine_pb.GetServerInfoResponse(
            active_requests=self._local_sessions.num_open,
            uptime_seconds=time.monotonic() - self._started_at,
            server_type="kvrelay",
            kv_connector=CONNECTOR,
            kv_role=engine.kv_role,
            data_parallel_size=1,
            block_size=engine.block_size,
            kv_cache_dtype=engine.model.kv_layout.dtype,
            pairing_protocol=engine.model.fingerprint,
            max_num_seqs=engine.max_running_sequences,
        )

    async def GetLoads(self, request: Message, context: Context) -> Message:
        load, block_size = self._sessions.load, self._engine.block_size
        scheduler_load = engine_pb.SchedulerLoad(
            num_running_reqs=load.num_running,
            num_waiting_reqs=load.num_waiting,
            num_total_reqs=load.num_running + load.num_waiting,
            num_used_tokens=load.num_used_blocks * block_size,
            max_total_num_tokens=load.num_blocks * block_size,
            token_usage=load.num_used_blocks / load.num_blocks if load.num_blocks else 0.0,
            max_running_requests=self._engine.max_running_sequences,
            num_waiting_uncached_tokens=load.num_queued_prompt_tokens,
        )
        now = datetime.now(UTC).isoformat()
        return engine_pb.GetLoadsResponse(
            timestamp=now, version=kvrelay.__version__, dp_rank_count=1, loads=[scheduler_load]
        )

    async def GetTokenizer(self, request: Message, context: Context) -> None:
        await self._tokenizer.send(self._engine.model.fingerprint, context.write)

    async def _files(self, _fingerprint: str) -> dict[str, bytes]:
        return await asyncio.to_thread(_files_of, self._engine.folder)

    def _job_of(self, request: Message, context: Context) -> Job:
        check_client_id(request.request_id)
        if request.WhichOneof("input") != "tokenized" or not request.tokenized.input_ids:
            raise InvalidRequestError("input", "must be tokenized: workers know tokens only")
        if request.HasField("mm_inputs") or request.extra_mm_inputs or request.HasField("media_refs"):
            raise UnsupportedError("images, video and audio are not taken; send token ids only")
        num_tokens = len(request.tokenized.input_ids)
        if num_tokens >= self._engine.max_tokens:
            raise self._too_long(num_tokens)
        token_ids = tuple(request.tokenized.input_ids)
        # smg matches stop strings, because it has the text.
        sampling = replace(sampling_from_vllm(request.sampling_params), stop=())
        sampling = with_model_defaults(sampling, request.sampling_params, self._engine.model)
        sampling = with_room(sampling, self._engine.max_tokens - len(token_ids))
        if sampling.max_tokens is None or len(token_ids) + sampling.max_tokens > self._engine.max_tokens:
            raise self._too_long(num_tokens)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        remaining_s = context.time_remaining()
        deadline_ms = int((DEFAULT_TIMEOUT_S if remaining_s is None else max(remaining_s, 0.0)) * 1000)
        return Job(JobId(secrets.token_hex(16), 1), token_ids, len(token_ids), sampling.n, sampling, "", deadline_ms)

    def _too_long(self, num_tokens: int) -> InvalidRequestError:
        problem = f"has {num_tokens} tokens; the longest sequence here has {self._engine.max_tokens}, with its output"
        return InvalidRequestError("tokenized.input_ids", problem)


def _files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tokenizer_files(folder)}


def error_of_failure(failed: Any) -> KvrelayError:
    """`failed` is a JobFailed message."""
    kind = failure_kind_from_pb(failed.kind)
    return _ERRORS.get(kind, InternalError)(failed.message)
