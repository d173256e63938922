"""Converts lifecycle actions to session messages, and messages to events."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.lifecycle import events
from kvrelay.core.bounds import MAX_ADDRESS_BYTES, check_count, check_length
from kvrelay.core.chunk_times import MAX_CHUNK_TIMES, ChunkTime
from kvrelay.core.job import JobId, SequenceToken
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.member import MemberRole
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.quoting import shortened
from kvrelay.security.cluster_key import Challenge
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.wire import convert

MAX_END_TOKENS = 1024
MAX_ENGINE_BYTES = 4096
MAX_FAILURE_CHARACTERS = 1000
"""Of a worker's sentence about a job."""

SessionRequest = decode_pb2.DecodeServiceSessionRequest | prefill_pb2.PrefillServiceSessionRequest
SessionResponse = decode_pb2.DecodeServiceSessionResponse | prefill_pb2.PrefillServiceSessionResponse
Command = (
    events.SendReserve
    | events.SendStartPrefill
    | events.SendRunPrompt
    | events.SendCancel
    | events.SendFinishSequence
    | events.SendSetPaused
)

_REQUEST_TYPES: dict[MemberRole, Callable[..., SessionRequest]] = {
    MemberRole.DECODE: decode_pb2.DecodeServiceSessionRequest,
    MemberRole.PREFILL: prefill_pb2.PrefillServiceSessionRequest,
}


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    worker_id: str
    protocol_version: int
    model: ModelSpec
    block_size: int
    max_sequence_tokens: int
    engine: str = ""  # for people


def hello(
    role: MemberRole,
    gateway_id: str,
    liveness_window_ms: int,
    challenge: Challenge | None = None,
    *,
    wants_cache_changes: bool = False,
) -> SessionRequest:
    greeting = session_pb2.GatewayHello(
        gateway_id=gateway_id,
        protocol_version=PROTOCOL_VERSION,
        liveness_window_ms=liveness_window_ms,
        wants_cache_changes=wants_cache_changes,
    )
    if challenge is not None:
        greeting.nonce, greeting.dialled_address = challenge.nonce, challenge.address
    return _REQUEST_TYPES[role](hello=greeting)


def heartbeat(role: MemberRole, number: int) -> SessionRequest:
    return _REQUEST_TYPES[role](heartbeat=session_pb2.Heartbeat(number=number))


def heartbeat_ack(role: MemberRole, number: int) -> SessionRequest:
    return _REQUEST_TYPES[role](heartbeat_ack=session_pb2.HeartbeatAck(number=number))


def command(role: MemberRole, action: Command, fingerprint: str) -> SessionRequest:
    """`fingerprint` is of the model that the request was routed by."""
    match action:
        case events.SendCancel(_, job_id):
            return _REQUEST_TYPES[role](cancel_job=session_pb2.CancelJob(job_id=convert.job_id_to_pb(job_id)))
        case events.SendReserve(_, job):
            return decode_pb2.DecodeServiceSessionRequest(reserve=convert.reserve_to_pb(job, fingerprint))
        case events.SendRunPrompt(_, job_id):
            return decode_pb2.DecodeServiceSessionRequest(
                run_prompt=decode_pb2.RunPrompt(job_id=convert.job_id_to_pb(job_id))
            )
        case events.SendFinishSequence(_, job_id, sequence):
            finish = decode_pb2.FinishSequence(job_id=convert.job_id_to_pb(job_id), sequence=sequence)
            return decode_pb2.DecodeServiceSessionRequest(finish_sequence=finish)
        case events.SendSetPaused(_, job_id, paused):
            pause = decode_pb2.SetPaused(job_id=convert.job_id_to_pb(job_id), paused=paused)
            return decode_pb2.DecodeServiceSessionRequest(set_paused=pause)
        case events.SendStartPrefill():
            start = convert.start_prefill_to_pb(
                action.job, action.ticket, action.push_address, action.num_cached_tokens
            )
            return prefill_pb2.PrefillServiceSessionRequest(start_prefill=start)


def identity(message: session_pb2.WorkerHello) -> WorkerIdentity:
    """Raises InvalidRequestError for texts that no worker sends."""
    check_length("hello.worker_id", message.worker_id)
    check_length("hello.engine", message.engine, MAX_ENGINE_BYTES)
    for name in ("name", "fingerprint", "architecture", "dtype"):
        check_length(f"hello.model.{name}", getattr(message.model, name), MAX_ADDRESS_BYTES)
    check_count("hello.model.eos_token_ids", message.model.eos_token_ids, MAX_END_TOKENS)
    return WorkerIdentity(
        message.worker_id,
        message.protocol_version,
        convert.model_from_pb(message.model),
        message.block_size,
        message.max_sequence_tokens,
        message.engine,
    )


def to_events(worker_id: str, response: SessionResponse) -> list[tuple[str, events.Event]]:
    """Returns (request id, event) for each request concerned."""
    kind = response.WhichOneof("message")
    if isinstance(response, decode_pb2.DecodeServiceSessionResponse) and kind == "step_output":
        return _decode_tokens(worker_id, response.step_output)
    if kind not in _CONVERTERS:
        return []
    message = getattr(response, str(kind))
    job_id = convert.job_id_from_pb(message.job_id)
    return [(job_id.request_id, _CONVERTERS[kind](worker_id, job_id, message))]


def _decode_tokens(worker_id: str, output: decode_pb2.StepOutput) -> list[tuple[str, events.Event]]:
    by_request: dict[str, list[SequenceToken]] = {}
    for token in map(convert.sequence_token_from_pb, output.tokens):
        by_request.setdefault(token.job_id.request_id, []).append(token)
    return [(request_id, events.DecodeTokens(worker_id, tuple(tokens))) for request_id, tokens in by_request.items()]


def _prefill_done(worker_id: str, job_id: JobId, done: prefill_pb2.PrefillDone) -> events.Event:
    tokens = tuple(map(convert.sequence_token_from_pb, done.tokens))
    return events.PrefillDone(
        worker_id, job_id, tokens, done.queue_ms, done.prefill_ms, _chunks(done), done.num_cached_tokens
    )


def _transfer_done(worker_id: str, job_id: JobId, done: prefill_pb2.TransferDone) -> events.Event:
    times = done.transfer_ms, done.exposed_ms, done.wire_ms
    return events.TransferDone(worker_id, job_id, done.kv_bytes, *times, done.transport, _chunks(done))


def _reserved(worker_id: str, job_id: JobId, reserved: decode_pb2.Reserved) -> events.Event:
    return events.Reserved(worker_id, job_id, reserved.ticket, reserved.push_address, reserved.num_cached_tokens)


def _decode_started(worker_id: str, job_id: JobId, started: decode_pb2.DecodeStarted) -> events.Event:
    times = started.prefill_ms, started.queue_ms
    return events.DecodeStarted(worker_id, job_id, started.kv_bytes, *times, _chunks(started))


def _job_failed(worker_id: str, job_id: JobId, failed: session_pb2.JobFailed) -> events.Event:
    message = shortened(failed.message, MAX_FAILURE_CHARACTERS)
    return events.JobFailed(worker_id, job_id, convert.failure_kind_from_pb(failed.kind), message)


def _chunks(
    message: prefill_pb2.PrefillDone | prefill_pb2.TransferDone | decode_pb2.DecodeStarted,
) -> tuple[ChunkTime, ...]:
    return tuple(map(convert.chunk_time_from_pb, message.chunks[:MAX_CHUNK_TIMES]))


_CONVERTERS: dict[str, Callable[[str, JobId, Any], events.Event]] = {
    "prefill_done": _prefill_done,
    "transfer_done": _transfer_done,
    "reserved": _reserved,
    "decode_started": _decode_started,
    "job_failed": _job_failed,
}
