"""What VllmEngine is on both kinds of workers, for smg in its prefill-decode mode straight before them, without our gateway.

smg knows ways to hand KV over by vLLM's names for them. Ours answers to NixlConnector's: the prefill worker is asked for one
token with `do_remote_decode`, and what its answer says goes to the decode worker as it is.
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

import grpc

import kvrelay
from kvrelay.errors import (
    CancelledRequestError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    KvrelayError,
    OverloadedError,
    TransferError,
    UnavailableError,
    UnsupportedError,
)
from kvrelay.model_service import tokenizer_files
from kvrelay.vllm_engine.local_session import LocalSession
from kvrelay.vllm_engine.messages import Message, engine_grpc, engine_pb
from kvrelay.vllm_engine.sampling import sampling_from_vllm, with_room
from kvrelay.vllm_engine.served_engine import ServedEngine
from kvrelay.vllm_engine.tokenizer_bundle import bundle, pieces
from kvrelay.wire import failure_kind_from_pb
from kvrelay.work import FailureKind, Work, WorkId
from kvrelay.worker_sessions import WorkerSessions

Context = grpc.aio.ServicerContext[Any, Any]
CONNECTOR = "NixlConnector"
DEFAULT_TIMEOUT_S = 300.0
"""Deadline of requests that come without one, as all of smg's do."""
_ERRORS: dict[FailureKind, Callable[[str], KvrelayError]] = {
    FailureKind.OUT_OF_CAPACITY: OverloadedError,
    FailureKind.TRANSFER: TransferError,
    FailureKind.DRAINING: UnavailableError,
    FailureKind.INVALID: lambda message: InvalidRequestError("request", message),
    FailureKind.DEADLINE: DeadlineError,
}


class WorkerVllmEngine(engine_grpc.VllmEngineServicer):  # type: ignore[misc]  # its base is not typed
    """All but Generate.

    Args:
        engine: the worker's.
        sessions: of the worker.
    """

    def __init__(self, engine: ServedEngine, sessions: WorkerSessions) -> None:
        self._engine = engine
        self._sessions = sessions
        self._started_at = time.monotonic()
        self._requests: dict[str, list[LocalSession]] = {}
        """Sessions by the ids that clients gave, which two clients may give twice."""
        self._archive: bytes | None = None

    async def Abort(self, request: Message, context: Context) -> Message:
        for request_id in request.request_ids:
            for session in self._requests.get(request_id, ()):
                session.send(failed=CancelledRequestError("the request was aborted"))
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
            tokenizer_path=str(self._engine.folder),
            is_generation=True,
            max_context_length=self._engine.max_tokens,
            max_req_input_len=self._engine.max_tokens - 1,
            vocab_size=model.vocab_size,
            model_type=model.architecture,
            eos_token_ids=model.eos_token_ids,
        )

    async def GetServerInfo(self, request: Message, context: Context) -> Message:
        engine = self._engine
        return engine_pb.GetServerInfoResponse(
            active_requests=sum(map(len, self._requests.values())),
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
        return engine_pb.GetLoadsResponse(timestamp=now, version=kvrelay.__version__, dp_rank_count=1, loads=[scheduler_load])

    async def GetTokenizer(self, request: Message, context: Context) -> AsyncIterator[Message]:
        if self._archive is None:
            self._archive = await asyncio.to_thread(_bundle_of, self._engine.folder)
        for piece in pieces(self._archive):
            yield piece

    async def FlushCache(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("prefix caches are not flushed: they hold nothing that may not be used")

    async def Embed(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("embeddings are not computed; ask for generated text")

    async def StartProfile(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("engines are not profiled through this service; see docs/measuring.md")

    async def StopProfile(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("engines are not profiled through this service; see docs/measuring.md")

    async def SubscribeKvEvents(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("events of single KV blocks are not published; GetLoads says how full the worker is")

    # --- For Generate

    def _work_of(self, request: Message, context: Context) -> Work:
        """The first attempt's work.

        Raises:
            InvalidRequestError, UnsupportedError: it cannot be served.
        """
        if not request.request_id:
            raise InvalidRequestError("request_id", "is empty; Abort needs it")
        if request.WhichOneof("input") != "tokenized" or not request.tokenized.input_ids:
            raise InvalidRequestError("input", "must be tokenized: workers know tokens only")
        if request.HasField("mm_inputs") or request.extra_mm_inputs or request.HasField("media_refs"):
            raise UnsupportedError("images, video and audio are not taken; send token ids only")
        token_ids = tuple(request.tokenized.input_ids)
        # Stop strings are matched by who has the text; smg does that anyway.
        sampling = replace(sampling_from_vllm(request.sampling_params), stop=())
        sampling = with_room(sampling, self._engine.max_tokens - len(token_ids))
        if sampling.max_tokens is None or len(token_ids) + sampling.max_tokens > self._engine.max_tokens:
            problem = f"has {len(token_ids)} tokens; the longest sequence here has {self._engine.max_tokens}, with its output"
            raise InvalidRequestError("tokenized.input_ids", problem)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        remaining_s = context.time_remaining()
        deadline_ms = int((DEFAULT_TIMEOUT_S if remaining_s is None else max(remaining_s, 0.0)) * 1000)
        return Work(WorkId(secrets.token_hex(16), 1), token_ids, len(token_ids), sampling.n, sampling, "", deadline_ms)

    def _open(self, request_id: str) -> LocalSession:
        """A session for the request; `_close` must follow."""
        session = LocalSession()
        self._requests.setdefault(request_id, []).append(session)
        return session

    def _close(self, request_id: str, session: LocalSession) -> None:
        """Gives up what the session still has."""
        self._sessions.end_works_of(session)
        sessions = self._requests[request_id]
        sessions.remove(session)
        if not sessions:
            del self._requests[request_id]


def _bundle_of(folder: Path) -> bytes:
    return bundle({path.name: path.read_bytes() for path in tokenizer_files(folder)})


def error_of_failure(failed: Any) -> KvrelayError:
    """The error for a WorkFailed message."""
    kind = failure_kind_from_pb(failed.kind)
    return _ERRORS.get(kind, InternalError)(failed.message)
