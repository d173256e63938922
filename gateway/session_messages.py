"""The gateway's side of the session protocols: actions to messages, and messages to lifecycle events. Knows no stream."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway import lifecycle_messages as m
from kvrelay import wire
from kvrelay.chunk_times import MAX_CHUNK_TIMES, ChunkTime
from kvrelay.liveness import PROTOCOL_VERSION
from kvrelay.model_spec import ModelSpec
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.work import SequenceToken
from kvrelay.worker_registry import MemberRole

SessionRequest = decode_pb2.DecodeServiceSessionRequest | prefill_pb2.PrefillServiceSessionRequest
SessionResponse = decode_pb2.DecodeServiceSessionResponse | prefill_pb2.PrefillServiceSessionResponse
Command = m.SendReserve | m.SendStartPrefill | m.SendRunPrompt | m.SendCancel | m.SendFinishSequence | m.SendSetPaused

_REQUEST_TYPES: dict[MemberRole, Callable[..., SessionRequest]] = {
    MemberRole.DECODE: decode_pb2.DecodeServiceSessionRequest,
    MemberRole.PREFILL: prefill_pb2.PrefillServiceSessionRequest,
}


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What a worker said of itself when the session began."""

    worker_id: str
    protocol_version: int
    model: ModelSpec
    block_size: int
    max_sequence_tokens: int


def hello(role: MemberRole, gateway_id: str, liveness_window_ms: int) -> SessionRequest:
    """First message of a session."""
    greeting = session_pb2.GatewayHello(
        gateway_id=gateway_id, protocol_version=PROTOCOL_VERSION, liveness_window_ms=liveness_window_ms
    )
    return _REQUEST_TYPES[role](hello=greeting)


def heartbeat(role: MemberRole, number: int) -> SessionRequest:
    return _REQUEST_TYPES[role](heartbeat=session_pb2.Heartbeat(number=number))


def heartbeat_ack(role: MemberRole, number: int) -> SessionRequest:
    return _REQUEST_TYPES[role](heartbeat_ack=session_pb2.HeartbeatAck(number=number))


def command(role: MemberRole, action: Command, fingerprint: str) -> SessionRequest:
    """The message for an action.

    Args:
        role: the worker's.
        action: works carry what is left of the deadline now.
        fingerprint: the one that the request was routed by.
    """
    match action:
        case m.SendCancel(_, work_id):
            return _REQUEST_TYPES[role](cancel_work=session_pb2.CancelWork(work_id=wire.work_id_to_pb(work_id)))
        case m.SendReserve(_, work):
            return decode_pb2.DecodeServiceSessionRequest(reserve=wire.reserve_to_pb(work, fingerprint))
        case m.SendRunPrompt(_, work_id):
            return decode_pb2.DecodeServiceSessionRequest(run_prompt=decode_pb2.RunPrompt(work_id=wire.work_id_to_pb(work_id)))
        case m.SendFinishSequence(_, work_id, sequence):
            finish = decode_pb2.FinishSequence(work_id=wire.work_id_to_pb(work_id), sequence=sequence)
            return decode_pb2.DecodeServiceSessionRequest(finish_sequence=finish)
        case m.SendSetPaused(_, work_id, paused):
            pause = decode_pb2.SetPaused(work_id=wire.work_id_to_pb(work_id), paused=paused)
            return decode_pb2.DecodeServiceSessionRequest(set_paused=pause)
        case m.SendStartPrefill():
            start = wire.start_prefill_to_pb(action.work, action.ticket, action.push_address, action.num_cached_tokens)
            return prefill_pb2.PrefillServiceSessionRequest(start_prefill=start)


def identity(message: session_pb2.WorkerHello) -> WorkerIdentity:
    """What a worker's hello says."""
    return WorkerIdentity(
        message.worker_id,
        message.protocol_version,
        wire.model_from_pb(message.model),
        message.block_size,
        message.max_sequence_tokens,
    )


def events(worker_id: str, response: SessionResponse) -> list[tuple[str, m.Event]]:
    """(request id, event) for each request that the message concerns; none for signs of life."""
    kind = response.WhichOneof("message")
    if isinstance(response, prefill_pb2.PrefillServiceSessionResponse):
        if kind == "prefill_done":
            return [_prefill_done(worker_id, response.prefill_done)]
        if kind == "transfer_done":
            return [_transfer_done(worker_id, response.transfer_done)]
    else:
        if kind == "step_output":
            return _step_output(worker_id, response.step_output)
        if kind == "reserved":
            return [_reserved(worker_id, response.reserved)]
        if kind == "decode_started":
            return [_decode_started(worker_id, response.decode_started)]
    if kind == "work_failed":
        return [_work_failed(worker_id, response.work_failed)]
    return []


def _step_output(worker_id: str, output: decode_pb2.StepOutput) -> list[tuple[str, m.Event]]:
    by_request: dict[str, list[SequenceToken]] = {}
    for token in map(wire.sequence_token_from_pb, output.tokens):
        by_request.setdefault(token.work_id.request_id, []).append(token)
    return [(request_id, m.DecodeTokens(worker_id, tuple(tokens))) for request_id, tokens in by_request.items()]


def _prefill_done(worker_id: str, done: prefill_pb2.PrefillDone) -> tuple[str, m.Event]:
    tokens = tuple(wire.sequence_token_from_pb(token) for token in done.tokens)
    work_id, chunks = wire.work_id_from_pb(done.work_id), _chunks(done)
    event = m.PrefillDone(worker_id, work_id, tokens, done.queue_ms, done.prefill_ms, chunks)
    return done.work_id.request_id, event


def _transfer_done(worker_id: str, done: prefill_pb2.TransferDone) -> tuple[str, m.Event]:
    work_id = wire.work_id_from_pb(done.work_id)
    times = done.transfer_ms, done.exposed_ms, done.wire_ms
    event = m.TransferDone(worker_id, work_id, done.kv_bytes, *times, done.transport, _chunks(done))
    return work_id.request_id, event


def _reserved(worker_id: str, reserved: decode_pb2.Reserved) -> tuple[str, m.Event]:
    work_id = wire.work_id_from_pb(reserved.work_id)
    event = m.Reserved(worker_id, work_id, reserved.ticket, reserved.push_address, reserved.num_cached_tokens)
    return work_id.request_id, event


def _decode_started(worker_id: str, started: decode_pb2.DecodeStarted) -> tuple[str, m.Event]:
    work_id = wire.work_id_from_pb(started.work_id)
    times = started.prefill_ms, started.queue_ms
    return work_id.request_id, m.DecodeStarted(worker_id, work_id, started.kv_bytes, *times, _chunks(started))


def _chunks(message: prefill_pb2.PrefillDone | prefill_pb2.TransferDone | decode_pb2.DecodeStarted) -> tuple[ChunkTime, ...]:
    """What a worker says of its chunks, and no more of it than it may say."""
    return tuple(map(wire.chunk_time_from_pb, message.chunks[:MAX_CHUNK_TIMES]))


def _work_failed(worker_id: str, failed: session_pb2.WorkFailed) -> tuple[str, m.Event]:
    work_id = wire.work_id_from_pb(failed.work_id)
    return work_id.request_id, m.WorkFailed(worker_id, work_id, wire.failure_kind_from_pb(failed.kind), failed.message)
