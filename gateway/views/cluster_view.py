"""The cluster's models, workers and gateways as messages."""

from gateway.gateway import Gateway
from gateway.requests.known_requests import request_info
from gateway.routing.router import WorkerView
from gateway.routing.routing import Routing
from gateway.telemetry.timelines import TransferSum
from gateway.workers.session import WorkerSession
from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import KvrelayError
from kvrelay.v1 import inference_pb2, session_pb2
from kvrelay.wire import convert

_ROLES = {
    MemberRole.PREFILL: inference_pb2.WORKER_ROLE_PREFILL,
    MemberRole.DECODE: inference_pb2.WORKER_ROLE_DECODE,
}
MAX_COUNTED_REQUESTS = 1000


async def served_models(gateway: Gateway) -> list[inference_pb2.ServedModel]:
    """Models of connected workers, by name."""
    by_version: dict[tuple[str, str], list[WorkerView]] = {}
    for view in gateway.sessions.views():
        by_version.setdefault((view.model.name, view.model.fingerprint), []).append(view)
    return [await _served_model(gateway, views) for _, views in sorted(by_version.items())]


async def _served_model(gateway: Gateway, views: list[WorkerView]) -> inference_pb2.ServedModel:
    model = views[0].model
    try:
        tokenizer = await gateway.tokenizers.get(model.fingerprint)
        has_chat_template = await gateway.preparation.texts.has_chat_template(tokenizer)
    except KvrelayError:
        has_chat_template = False
    return inference_pb2.ServedModel(
        model=convert.model_to_pb(model),
        num_prefill_workers=sum(view.role is MemberRole.PREFILL for view in views),
        num_decode_workers=sum(view.role is MemberRole.DECODE for view in views),
        has_chat_template=has_chat_template,
    )


async def cluster(gateway: Gateway) -> inference_pb2.GetClusterResponse:
    """Members with a lease or a session, and this gateway's running requests."""
    sessions = gateway.sessions.sessions()
    connected = {session.worker_id for session in sessions}
    leased = [
        member
        for member in gateway.members()
        if member.role is not MemberRole.GATEWAY and member.instance_id not in connected
    ]
    health = inference_pb2.STATE_STORE_HEALTH_OK if gateway.store.healthy else inference_pb2.STATE_STORE_HEALTH_DEGRADED
    return inference_pb2.GetClusterResponse(
        gateways=await _gateways(gateway),
        workers=[*map(_connected_worker, sessions), *(_leased_worker(member, gateway) for member in leased)],
        state_store=health,
        gateway_id=gateway.gateway_id,
        running_requests=[request_info(runner.journal.record) for runner in gateway.requests.running()],
        transfers=[_transfer_total(*entry) for entry in gateway.timelines.transfers()],
        num_output_tokens=gateway.timelines.total_output_tokens,
        state_store_problem=gateway.store.health.problem or "",
        routing=_routing(gateway.sessions.routing),
    )


def _routing(routing: Routing) -> inference_pb2.RoutingInfo:
    hits = routing.hits
    return inference_pb2.RoutingInfo(
        strategy=routing.strategy,
        cache_hits=[
            inference_pb2.CacheHits(
                role=number,
                num_prompt_tokens=hits.num_prompt_tokens[role],
                num_expected_tokens=hits.num_expected[role],
                num_found_tokens=hits.num_found[role],
            )
            for role, number in _ROLES.items()
        ],
        num_index_entries=routing.num_index_entries,
    )


def _transfer_total(prefill_worker_id: str, decode_worker_id: str, total: TransferSum) -> inference_pb2.TransferTotal:
    return inference_pb2.TransferTotal(
        prefill_worker_id=prefill_worker_id,
        decode_worker_id=decode_worker_id,
        num_transfers=total.num_transfers,
        kv_bytes=total.kv_bytes,
        wire_ms=total.wire_ms,
    )


async def _gateways(gateway: Gateway) -> list[inference_pb2.GatewayInfo]:
    others = gateway.gateways.addresses()
    counts = await _count_requests(gateway) if others else {}
    counts[gateway.gateway_id] = gateway.requests.num_running
    addresses = others | {gateway.gateway_id: gateway.address}
    return [
        inference_pb2.GatewayInfo(
            gateway_id=gateway_id, address=address, num_running_requests=counts.get(gateway_id, 0)
        )
        for gateway_id, address in sorted(addresses.items())
    ]


async def _count_requests(gateway: Gateway) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in (await gateway.known_requests.read_page(MAX_COUNTED_REQUESTS, active_only=True)).requests:
        counts[record.gateway_id] = counts.get(record.gateway_id, 0) + 1
    return counts


def _connected_worker(session: WorkerSession) -> inference_pb2.WorkerInfo:
    return inference_pb2.WorkerInfo(
        worker_id=session.worker_id,
        role=_ROLES[session.role],
        address=session.address,
        model=convert.model_to_pb(session.identity.model),
        load=convert.load_to_pb(session.load),
        connected=True,
        silent_ms=session.silent_ms,
        block_size=session.identity.block_size,
        engine=session.identity.engine,
    )


def _leased_worker(member: Member, gateway: Gateway) -> inference_pb2.WorkerInfo:
    return inference_pb2.WorkerInfo(
        worker_id=member.instance_id,
        role=_ROLES[member.role],
        address=member.address,
        model=session_pb2.ModelInfo(name=member.model, fingerprint=member.fingerprint),
        connected=False,
        problem=gateway.sessions.problem(member.role, member.address),
    )
