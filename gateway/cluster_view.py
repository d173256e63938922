"""What the gateway tells about itself: requests, models, workers and gateways as messages. Reads only."""

from google.protobuf.timestamp_pb2 import Timestamp

from gateway.relay import Relay
from gateway.router import WorkerView
from gateway.timelines import TransferSum
from gateway.worker_session import WorkerSession
from kvrelay import wire
from kvrelay.errors import KvrelayError, UnavailableError, UnreadableStateError
from kvrelay.request_list import RequestPage
from kvrelay.request_record import RequestSummary
from kvrelay.request_state import RequestState, is_terminal
from kvrelay.v1 import inference_pb2, session_pb2
from kvrelay.worker_registry import Member, MemberRole

_ROLES = {
    MemberRole.PREFILL: inference_pb2.WORKER_ROLE_PREFILL,
    MemberRole.DECODE: inference_pb2.WORKER_ROLE_DECODE,
}
MAX_COUNTED_REQUESTS = 1000


def state_to_pb(state: RequestState) -> "inference_pb2.RequestState.ValueType":
    return inference_pb2.RequestState.Value(f"REQUEST_STATE_{state.value}")


def request_info(record: RequestSummary) -> inference_pb2.RequestInfo:
    """A request as clients see it."""
    return inference_pb2.RequestInfo(
        request_id=record.request_id,
        state=state_to_pb(record.state),
        model=record.model,
        tenant=record.tenant,
        attempt=record.attempt,
        num_prompt_tokens=record.num_prompt_tokens,
        num_output_tokens=record.num_output_tokens,
        gateway_id=record.gateway_id,
        prefill_worker_id=record.prefill_worker_id,
        decode_worker_id=record.decode_worker_id,
        create_time=_timestamp(record.create_time_ms),
        update_time=_timestamp(record.update_time_ms),
        error_message=record.error_message,
    )


async def list_requests(relay: Relay, page_size: int, page_token: str, active_only: bool) -> RequestPage:
    """One page of all gateways' requests; while the store is away or its list is unreadable, those that this gateway knows.

    Raises:
        InvalidRequestError: the page token is none of ours.
    """
    try:
        return await relay.store.list_requests(page_size, page_token, active_only)
    except (UnavailableError, UnreadableStateError):
        known: list[RequestSummary] = [runner.journal.record for runner in relay.requests.known()]
        wanted = [record for record in known if not (active_only and is_terminal(record.state))]
        return RequestPage(wanted[:page_size], "")


async def served_models(relay: Relay) -> list[inference_pb2.ServedModel]:
    """Models of connected workers, by name."""
    by_version: dict[tuple[str, str], list[WorkerView]] = {}
    for view in relay.sessions.views():
        by_version.setdefault((view.model.name, view.model.fingerprint), []).append(view)
    return [await _served_model(relay, views) for _, views in sorted(by_version.items())]


async def _served_model(relay: Relay, views: list[WorkerView]) -> inference_pb2.ServedModel:
    model = views[0].model
    try:
        has_chat_template = (await relay.tokenizers.get(model.fingerprint)).has_chat_template
    except KvrelayError:
        has_chat_template = False
    return inference_pb2.ServedModel(
        model=wire.model_to_pb(model),
        num_prefill_workers=sum(view.role is MemberRole.PREFILL for view in views),
        num_decode_workers=sum(view.role is MemberRole.DECODE for view in views),
        has_chat_template=has_chat_template,
    )


async def cluster(relay: Relay) -> inference_pb2.GetClusterResponse:
    """Gateways and workers with a lease or a session, and this gateway's running requests."""
    sessions = relay.sessions.sessions()
    connected = {session.worker_id for session in sessions}
    leased = [
        member for member in relay.members() if member.role is not MemberRole.GATEWAY and member.instance_id not in connected
    ]
    health = inference_pb2.STATE_STORE_HEALTH_OK if relay.store.healthy else inference_pb2.STATE_STORE_HEALTH_DEGRADED
    return inference_pb2.GetClusterResponse(
        gateways=await _gateways(relay),
        workers=[*map(_connected_worker, sessions), *map(_leased_worker, leased)],
        state_store=health,
        gateway_id=relay.gateway_id,
        running_requests=[request_info(runner.journal.record) for runner in relay.requests.running()],
        transfers=[_transfer_total(*entry) for entry in relay.timelines.transfers()],
        num_output_tokens=relay.timelines.total_output_tokens,
    )


def _transfer_total(prefill_worker_id: str, decode_worker_id: str, total: TransferSum) -> inference_pb2.TransferTotal:
    return inference_pb2.TransferTotal(
        prefill_worker_id=prefill_worker_id,
        decode_worker_id=decode_worker_id,
        num_transfers=total.num_transfers,
        kv_bytes=total.kv_bytes,
        wire_ms=total.wire_ms,
    )


async def _gateways(relay: Relay) -> list[inference_pb2.GatewayInfo]:
    others = [member for member in relay.members(MemberRole.GATEWAY) if member.instance_id != relay.gateway_id]
    counts = await _count_requests(relay) if others else {}
    counts[relay.gateway_id] = len(relay.requests.running())
    addresses = {member.instance_id: member.address for member in others} | {relay.gateway_id: relay.address}
    return [
        inference_pb2.GatewayInfo(gateway_id=gateway_id, address=address, num_running_requests=counts.get(gateway_id, 0))
        for gateway_id, address in sorted(addresses.items())
    ]


async def _count_requests(relay: Relay) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in (await list_requests(relay, MAX_COUNTED_REQUESTS, "", True)).requests:
        counts[record.gateway_id] = counts.get(record.gateway_id, 0) + 1
    return counts


def _connected_worker(session: WorkerSession) -> inference_pb2.WorkerInfo:
    return inference_pb2.WorkerInfo(
        worker_id=session.worker_id,
        role=_ROLES[session.role],
        address=session.address,
        model=wire.model_to_pb(session.identity.model),
        load=wire.load_to_pb(session.load),
        connected=True,
        silent_ms=session.silent_ms,
        block_size=session.identity.block_size,
    )


def _leased_worker(member: Member) -> inference_pb2.WorkerInfo:
    return inference_pb2.WorkerInfo(
        worker_id=member.instance_id,
        role=_ROLES[member.role],
        address=member.address,
        model=session_pb2.ModelInfo(name=member.model, fingerprint=member.fingerprint),
        connected=False,
    )


def _timestamp(time_ms: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(time_ms)
    return timestamp
