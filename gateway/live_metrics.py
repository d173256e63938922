"""What /metrics of a gateway shows: what was counted, how many requests run and wait, and how full the workers are."""

from collections import Counter
from collections.abc import Iterator

from gateway import metrics
from gateway.relay import Relay
from kvrelay.metrics import vllm_names
from kvrelay.metrics.families import Sample
from kvrelay.worker_registry import MemberRole


def samples(relay: Relay) -> Iterator[Sample]:
    """Everything under kvrelay's own names."""
    yield from relay.metrics.samples()
    running, waiting = _requests(relay)
    for model in _models(relay):
        yield Sample(metrics.RUNNING, running[model], (model,))
        yield Sample(metrics.WAITING, waiting[model], (model,))
    yield Sample(metrics.QUEUED_TOKENS, relay.admission.num_queued_prompt_tokens)
    roles = Counter(session.role for session in relay.sessions.sessions())
    yield from (Sample(metrics.WORKERS, roles[role], (role.value,)) for role in (MemberRole.PREFILL, MemberRole.DECODE))
    for role in (MemberRole.PREFILL, MemberRole.DECODE):
        for cause, died in (("broken", True), ("other", False)):
            yield Sample(metrics.LOSSES, relay.sessions.num_lost[role, died], (role.value, cause))
    yield Sample(metrics.STORE_HEALTHY, float(relay.store.healthy))


def vllm_samples(relay: Relay) -> Iterator[Sample]:
    """The same under the names that vLLM has for it: a gateway and its workers are one engine to whoever reads them."""
    running, waiting = _requests(relay)
    for model in _models(relay):
        usage = _kv_usage(relay, model)
        yield from vllm_names.gauges(model, running[model], waiting[model], usage)
        yield from _vllm_counts(model, relay.metrics.of_model(model))


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


def _models(relay: Relay) -> list[str]:
    """Names of models that have been asked for, or could be."""
    served = {session.identity.model.name for session in relay.sessions.sessions()}
    return sorted(served | relay.metrics.models.keys())


def _requests(relay: Relay) -> tuple[Counter[str], Counter[str]]:
    """Requests of each model with and without a first token."""
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for runner in relay.requests.running():
        (waiting if runner.waits else running)[runner.request.model] += 1
    return running, waiting


def _kv_usage(relay: Relay, model: str) -> float:
    """Share of the decode workers' KV blocks that is in use, from 0 to 1."""
    loads = [
        session.load
        for session in relay.sessions.sessions()
        if session.role is MemberRole.DECODE and session.identity.model.name == model
    ]
    num_blocks = sum(load.num_blocks for load in loads)
    return sum(load.num_used_blocks for load in loads) / num_blocks if num_blocks else 0.0
