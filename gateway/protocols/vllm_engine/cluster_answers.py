"""Presents a gateway and its workers to VllmEngine's clients as one engine."""

from datetime import UTC, datetime

import kvrelay
from gateway.gateway import Gateway
from gateway.routing.router import WorkerView
from gateway.workers.served_models import ModelLimits
from kvrelay.core.member import MemberRole
from kvrelay.vllm_engine.messages import Message, engine_pb
from kvrelay.vllm_engine.sampling import defaults_json

SERVER_TYPE = "kvrelay"


def health(gateway: Gateway) -> Message:
    if gateway.draining:
        return engine_pb.HealthCheckResponse(healthy=False, message="this gateway is shutting down")
    if not gateway.models.connected():
        return engine_pb.HealthCheckResponse(healthy=False, message="no decode worker is connected")
    return engine_pb.HealthCheckResponse(healthy=True, message="serving")


def model_info(limits: ModelLimits) -> Message:
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
        default_sampling_params_json=defaults_json(model),
    )


def server_info(gateway: Gateway, uptime_s: float) -> Message:
    blocks = {view.block_size for view in _decode_views(gateway)}
    return engine_pb.GetServerInfoResponse(
        active_requests=len(gateway.requests.running()),
        uptime_seconds=uptime_s,
        server_type=SERVER_TYPE,
        data_parallel_size=1,
        block_size=min(blocks, default=0),
        max_num_seqs=gateway.settings.max_running_requests,
    )


def loads(gateway: Gateway) -> Message:
    views = _decode_views(gateway)
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
        max_running_requests=gateway.settings.max_running_requests,
        num_waiting_uncached_tokens=sum(view.load.num_queued_prompt_tokens for view in gateway.sessions.views()),
    )
    return engine_pb.GetLoadsResponse(
        timestamp=datetime.now(UTC).isoformat(), version=kvrelay.__version__, dp_rank_count=1, loads=[load]
    )


def _decode_views(gateway: Gateway) -> list[WorkerView]:
    return [view for view in gateway.sessions.views() if view.role is MemberRole.DECODE]
