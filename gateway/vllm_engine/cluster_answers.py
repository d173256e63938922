"""What VllmEngine tells about a gateway: its model, its health, and its workers' load as if they were one engine. Reads only."""

from datetime import UTC, datetime

import kvrelay
from gateway.relay import Relay
from gateway.request_validation import ModelLimits
from gateway.router import WorkerView
from kvrelay.vllm_engine.messages import Message, engine_pb
from kvrelay.worker_registry import MemberRole

SERVER_TYPE = "kvrelay"


def health(relay: Relay) -> Message:
    """Healthy while new requests are taken and there is somebody to serve them."""
    if relay.draining:
        return engine_pb.HealthCheckResponse(healthy=False, message="this gateway is shutting down")
    if not relay.models.connected():
        return engine_pb.HealthCheckResponse(healthy=False, message="no decode worker is connected")
    return engine_pb.HealthCheckResponse(healthy=True, message="serving")


def model_info(limits: ModelLimits) -> Message:
    """The model, as far as a gateway knows it."""
    model = limits.model
    return engine_pb.GetModelInfoResponse(
        model_path=model.name,
        served_model_name=model.name,
        is_generation=True,
        max_context_length=limits.max_tokens,
        max_req_input_len=limits.max_tokens - 1,
        vocab_size=model.vocab_size,
        model_type=model.architecture,
        eos_token_ids=model.eos_token_ids,
    )


def server_info(relay: Relay, uptime_s: float) -> Message:
    """The gateway."""
    blocks = {view.block_size for view in _decode_views(relay)}
    return engine_pb.GetServerInfoResponse(
        active_requests=len(relay.requests.running()),
        uptime_seconds=uptime_s,
        server_type=SERVER_TYPE,
        data_parallel_size=1,
        block_size=min(blocks, default=0),
        max_num_seqs=relay.settings.max_running_requests,
    )


def loads(relay: Relay) -> Message:
    """All decode workers together."""
    views = _decode_views(relay)
    num_used_tokens = sum(view.load.num_used_blocks * view.block_size for view in views)
    num_tokens = sum(view.load.num_blocks * view.block_size for view in views)
    num_running = sum(view.load.num_running for view in views)
    num_waiting = sum(view.load.num_waiting for view in views)
    load = engine_pb.SchedulerLoad(
        num_running_reqs=num_running,
        num_waiting_reqs=num_waiting,
        num_total_reqs=num_running + num_waiting,
        num_used_tokens=num_used_tokens,
        max_total_num_tokens=num_tokens,
        token_usage=num_used_tokens / num_tokens if num_tokens else 0.0,
        max_running_requests=relay.settings.max_running_requests,
        num_waiting_uncached_tokens=sum(view.load.num_queued_prompt_tokens for view in relay.sessions.views()),
    )
    return engine_pb.GetLoadsResponse(
        timestamp=datetime.now(UTC).isoformat(), version=kvrelay.__version__, dp_rank_count=1, loads=[load]
    )


def _decode_views(relay: Relay) -> list[WorkerView]:
    return [view for view in relay.sessions.views() if view.role is MemberRole.DECODE]
