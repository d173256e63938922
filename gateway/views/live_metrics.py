"""Samples of a gateway's /metrics."""

from collections import Counter
from collections.abc import Iterator

from gateway.gateway import Gateway
from gateway.routing.routing import Routing
from gateway.telemetry import metrics
from kvrelay.core.member import MemberRole
from kvrelay.observability.metrics import vllm_names
from kvrelay.observability.metrics.families import Sample


def samples(gateway: Gateway) -> Iterator[Sample]:
    """Under kvrelay's own names."""
    yield from gateway.metrics.samples()
    running, waiting = _requests(gateway)
    for model in _models(gateway):
        yield Sample(metrics.RUNNING, running[model], (model,))
        yield Sample(metrics.WAITING, waiting[model], (model,))
    yield Sample(metrics.WAITING_FOR_PLACE, gateway.admission.num_waiting_for_place)
    yield Sample(metrics.QUEUED_TOKENS, gateway.admission.num_queued_prompt_tokens)
    roles = Counter(session.role for session in gateway.sessions.sessions())
    yield from (Sample(metrics.WORKERS, roles[role], (role.value,)) for role in (MemberRole.PREFILL, MemberRole.DECODE))
    yield from _routing_samples(gateway.sessions.routing)
    for role in (MemberRole.PREFILL, MemberRole.DECODE):
        for cause, died in (("broken", True), ("other", False)):
            yield Sample(metrics.LOSSES, gateway.sessions.num_lost[role, died], (role.value, cause))
        yield Sample(metrics.PLACEMENTS, gateway.sessions.num_placed[role], (role.value,))
    for outcome, number in gateway.format_checks.outcomes.items():
        yield Sample(metrics.FORMATS, number, (outcome,))
    for outcome, number in gateway.chat_renderer.outcomes.items():
        yield Sample(metrics.CHATS, number, (outcome,))
    yield Sample(metrics.CONFINED_CHILDREN, gateway.format_checks.num_children_started, ("format",))
    yield Sample(metrics.CONFINED_CHILDREN, gateway.chat_renderer.pool.num_started, ("chat",))
    yield Sample(metrics.STORE_HEALTHY, float(gateway.store.healthy))


def _routing_samples(routing: Routing) -> Iterator[Sample]:
    for role in (MemberRole.PREFILL, MemberRole.DECODE):
        yield Sample(metrics.ROUTED_TOKENS, routing.hits.num_prompt_tokens[role], (role.value,))
        yield Sample(metrics.EXPECTED_TOKENS, routing.hits.num_expected[role], (role.value,))
        yield Sample(metrics.FOUND_TOKENS, routing.hits.num_found[role], (role.value,))
    yield Sample(metrics.INDEX_ENTRIES, routing.num_index_entries)


def vllm_samples(gateway: Gateway) -> Iterator[Sample]:
    """Under vLLM's names, as if a gateway and its workers were one engine."""
    running, waiting = _requests(gateway)
    for model in _models(gateway):
        usage = _kv_usage(gateway, model)
        yield from vllm_names.gauges(model, running[model], waiting[model], usage)
        yield from _vllm_counts(model, gateway.metrics.of_model(model))


def _vllm_counts(model: str, counted: metrics.ModelMetrics) -> Iterator[Sample]:
    label = vllm_names.labels(model)
    yield Sample(vllm_names.PROMPT_TOKENS, counted.num_prompt_tokens, label)
    yield Sample(vllm_names.GENERATION_TOKENS, counted.num_output_tokens, label)
    for reason, number in (*counted.finish_reasons.items(), ("abort", counted.outcomes["cancelled"])):
        yield Sample(vllm_names.SUCCESS, number, (*label, reason))
    for family, histogram in (
        (vllm_names.FIRST_TOKEN, counted.first_token),
        (vllm_names.INTER_TOKEN, counted.inter_token),
        (vllm_names.PER_TOKEN, counted.per_token),
        (vllm_names.END_TO_END, counted.duration),
        (vllm_names.QUEUE, counted.phases["queue"]),
        (vllm_names.PREFILL, counted.phases["prefill"]),
        (vllm_names.DECODE, counted.phases["decode"]),
        (vllm_names.PROMPT_SIZE, counted.prompt_size),
        (vllm_names.OUTPUT_SIZE, counted.output_size),
    ):
        yield Sample(family, histogram, label)


def _models(gateway: Gateway) -> list[str]:
    served = {session.identity.model.name for session in gateway.sessions.sessions()}
    return sorted(served | gateway.metrics.models.keys())


def _requests(gateway: Gateway) -> tuple[Counter[str], Counter[str]]:
    """With and without a first token, by model."""
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for runner in gateway.requests.running():
        (waiting if runner.waits else running)[runner.request.model] += 1
    return running, waiting


def _kv_usage(gateway: Gateway, model: str) -> float:
    """Used share of the decode workers' KV blocks, 0 to 1."""
    loads = [
        session.load
        for session in gateway.sessions.sessions()
        if session.role is MemberRole.DECODE and session.identity.model.name == model
    ]
    num_blocks = sum(load.num_blocks for load in loads)
    return sum(load.num_used_blocks for load in loads) / num_blocks if num_blocks else 0.0
