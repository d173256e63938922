"""The frozen values that the client returns, and how they are made from messages."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from google.protobuf.timestamp_pb2 import Timestamp

from kvrelay.core.job import FinishReason, Token, WorkerLoad
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.timeline import Phases, Timeline
from kvrelay.v1 import inference_pb2
from kvrelay.wire import convert
from kvrelay.wire.timeline import phases_from_pb, timeline_from_pb


class RequestState(Enum):
    """States of a request. The last four are final."""

    UNKNOWN = "unknown"
    QUEUED = "queued"
    RESERVING = "reserving"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        return self in (RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED)


class WorkerRole(Enum):
    """The phase that a worker computes."""

    UNKNOWN = "unknown"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """`role`: system, user, assistant, or another of the model's template."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request was admitted. `seed` was given or drawn."""

    request_id: str
    model: str
    num_prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one sequence. Text may lag behind tokens."""

    sequence: int
    index: int
    """Output index of the first token."""
    tokens: tuple[Token, ...]
    text: str
    finish_reason: FinishReason | None = None
    """Set in the sequence's last delta."""


@dataclass(frozen=True, slots=True)
class Usage:
    """`num_cached_tokens` of the prompt were cached on the decode worker."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request that succeeded."""

    finish_reasons: tuple[FinishReason | None, ...]
    usage: Usage
    phases: Phases


Event = Accepted | Delta | Finished


@dataclass(frozen=True, slots=True)
class Output:
    """All output of one sequence."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request, with one output per sequence."""

    accepted: Accepted
    outputs: tuple[Output, ...]
    finished: Finished

    @property
    def text(self) -> str:
        """Text of the first sequence."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """A request as its gateway knows it. Worker ids are empty while unassigned."""

    request_id: str
    state: RequestState
    model: str
    tenant: str
    attempt: int
    num_prompt_tokens: int
    num_output_tokens: int
    gateway_id: str
    prefill_worker_id: str
    decode_worker_id: str
    create_time: datetime
    update_time: datetime
    error_message: str


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that live workers serve."""

    model: ModelSpec
    num_prefill_workers: int
    num_decode_workers: int
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the asked gateway sees it."""

    worker_id: str
    role: WorkerRole
    address: str
    model: ModelSpec
    load: WorkerLoad
    connected: bool
    silent_ms: float
    block_size: int
    problem: str = ""
    """Why the worker is not connected; empty if unknown."""
    engine: str = ""
    """What computes, for people."""


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """A gateway and its number of running requests."""

    gateway_id: str
    address: str
    num_running_requests: int


@dataclass(frozen=True, slots=True)
class TransferTotal:
    """KV transfers of a pair for one gateway since it started."""

    prefill_worker_id: str
    decode_worker_id: str
    num_transfers: int
    kv_bytes: int
    wire_ms: float


@dataclass(frozen=True, slots=True)
class CacheHits:
    """Tokens of prompts in the prefix caches of the workers chosen: expected, and found."""

    role: WorkerRole
    num_prompt_tokens: int
    num_expected_tokens: int
    num_found_tokens: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster as the gateway `gateway_id` sees it. `degraded`: it cannot keep state."""

    gateway_id: str
    gateways: tuple[GatewayInfo, ...]
    workers: tuple[WorkerInfo, ...]
    degraded: bool
    running_requests: tuple[RequestInfo, ...]
    transfers: tuple[TransferTotal, ...] = ()
    num_output_tokens: int = 0
    """Emitted since the gateway started."""
    problem: str = ""
    """Why the cluster is degraded; empty if unknown."""
    routing: str = ""
    """The gateway's strategy; empty if unknown."""
    cache_hits: tuple[CacheHits, ...] = ()
    num_index_entries: int = 0
    """Pairs of a cached block and a worker that the gateway knows."""


@dataclass(frozen=True, slots=True)
class RequestPage:
    """Requests, newest first. `next_page_token` is empty on the last page."""

    requests: tuple[RequestInfo, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class RequestTimeline:
    """A request and its timeline."""

    request: RequestInfo
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Health:
    """A gateway's answer to a health check."""

    serving: bool
    address: str
    insecure: bool = False
    """Everybody who reaches it has all rights, or keys come to it in plain text; see --insecure."""
    broken_credentials: bool = False
    """A changed file of keys or certificates cannot be used, and what it had before counts."""


StreamResponse = inference_pb2.GenerateResponse | inference_pb2.ConverseResponse | inference_pb2.ResumeResponse


def event_from_pb(message: StreamResponse) -> Event | None:
    """None for an unknown event."""
    kind = message.WhichOneof("event")
    if kind == "accepted":
        return accepted_from_pb(message.accepted)
    if kind == "delta":
        return delta_from_pb(message.delta)
    if kind == "finished":
        return finished_from_pb(message.finished)
    return None


def accepted_from_pb(message: inference_pb2.Accepted) -> Accepted:
    return Accepted(message.request_id, message.model, message.num_prompt_tokens, message.seed)


def delta_from_pb(message: inference_pb2.Delta) -> Delta:
    return Delta(
        sequence=message.sequence,
        index=message.index,
        tokens=tuple(convert.token_from_pb(token) for token in message.tokens),
        text=message.text,
        finish_reason=convert.finish_reason_from_pb(message.finish_reason),
    )


def finished_from_pb(message: inference_pb2.Finished) -> Finished:
    return Finished(
        finish_reasons=tuple(convert.finish_reason_from_pb(reason) for reason in message.finish_reasons),
        usage=Usage(message.usage.num_prompt_tokens, message.usage.num_output_tokens, message.usage.num_cached_tokens),
        phases=phases_from_pb(message.phases),
    )


def request_state_from_pb(number: "inference_pb2.RequestState.ValueType") -> RequestState:
    """UNKNOWN for an unknown state."""
    name = inference_pb2.RequestState.Name(number) if number in inference_pb2.RequestState.values() else ""
    return RequestState.__members__.get(name.removeprefix("REQUEST_STATE_"), RequestState.UNKNOWN)


def request_info_from_pb(message: inference_pb2.RequestInfo) -> RequestInfo:
    return RequestInfo(
        request_id=message.request_id,
        state=request_state_from_pb(message.state),
        model=message.model,
        tenant=message.tenant,
        attempt=message.attempt,
        num_prompt_tokens=message.num_prompt_tokens,
        num_output_tokens=message.num_output_tokens,
        gateway_id=message.gateway_id,
        prefill_worker_id=message.prefill_worker_id,
        decode_worker_id=message.decode_worker_id,
        create_time=_time(message.create_time),
        update_time=_time(message.update_time),
        error_message=message.error_message,
    )


def request_page_from_pb(message: inference_pb2.ListRequestsResponse) -> RequestPage:
    return RequestPage(tuple(request_info_from_pb(request) for request in message.requests), message.next_page_token)


def served_model_from_pb(message: inference_pb2.ServedModel) -> ServedModel:
    return ServedModel(
        model=convert.model_from_pb(message.model),
        num_prefill_workers=message.num_prefill_workers,
        num_decode_workers=message.num_decode_workers,
        has_chat_template=message.has_chat_template,
    )


_ROLES = {inference_pb2.WORKER_ROLE_PREFILL: WorkerRole.PREFILL, inference_pb2.WORKER_ROLE_DECODE: WorkerRole.DECODE}


def worker_info_from_pb(message: inference_pb2.WorkerInfo) -> WorkerInfo:
    return WorkerInfo(
        worker_id=message.worker_id,
        role=_ROLES.get(message.role, WorkerRole.UNKNOWN),
        address=message.address,
        model=convert.model_from_pb(message.model),
        load=convert.load_from_pb(message.load),
        connected=message.connected,
        silent_ms=convert.milliseconds_from_pb(message.silent_ms),
        block_size=message.block_size,
        problem=message.problem,
        engine=message.engine,
    )


def cluster_from_pb(message: inference_pb2.GetClusterResponse) -> Cluster:
    return Cluster(
        gateway_id=message.gateway_id,
        gateways=tuple(
            GatewayInfo(item.gateway_id, item.address, item.num_running_requests) for item in message.gateways
        ),
        workers=tuple(worker_info_from_pb(worker) for worker in message.workers),
        degraded=message.state_store == inference_pb2.STATE_STORE_HEALTH_DEGRADED,
        running_requests=tuple(request_info_from_pb(request) for request in message.running_requests),
        transfers=tuple(
            TransferTotal(
                item.prefill_worker_id, item.decode_worker_id, item.num_transfers, item.kv_bytes, item.wire_ms
            )
            for item in message.transfers
        ),
        num_output_tokens=message.num_output_tokens,
        problem=message.state_store_problem,
        routing=message.routing.strategy,
        cache_hits=tuple(
            CacheHits(
                _ROLES.get(hits.role, WorkerRole.UNKNOWN),
                hits.num_prompt_tokens,
                hits.num_expected_tokens,
                hits.num_found_tokens,
            )
            for hits in message.routing.cache_hits
        ),
        num_index_entries=message.routing.num_index_entries,
    )


def request_timeline_from_pb(message: inference_pb2.GetTimelineResponse) -> RequestTimeline:
    return RequestTimeline(request_info_from_pb(message.request), timeline_from_pb(message.timeline))


def _time(message: Timestamp) -> datetime:
    moment: datetime = message.ToDatetime(tzinfo=UTC)
    return moment
