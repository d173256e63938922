"""Metrics under vLLM's names, for routers and dashboards that read those (--vllm-metrics).

`engine` is always "0". The Gateway API Inference Extension reads the request gauges, KV usage and
`vllm:cache_config_info`.
"""

from collections.abc import Iterator

from kvrelay.observability.metrics.families import Family, Sample

LABELS = ("model_name", "engine")
ENGINE = "0"

RUNNING = Family("vllm:num_requests_running", "gauge", "Requests that are being computed.", LABELS)
WAITING = Family("vllm:num_requests_waiting", "gauge", "Requests that wait to be computed.", LABELS)
KV_USAGE = Family("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks in use; 1 is all.", LABELS)
GPU_USAGE = Family("vllm:gpu_cache_usage_perc", "gauge", "The same under its older name.", LABELS)
CACHE_CONFIG = Family(
    "vllm:cache_config_info",
    "gauge",
    "Always 1; labels give the size and number of KV blocks.",
    (*LABELS, "block_size", "num_gpu_blocks"),
)
PROMPT_TOKENS = Family("vllm:prompt_tokens_total", "counter", "Prompt tokens.", LABELS)
GENERATION_TOKENS = Family("vllm:generation_tokens_total", "counter", "Generated tokens.", LABELS)
SUCCESS = Family(
    "vllm:request_success_total", "counter", "Sequences that ended, by reason.", (*LABELS, "finished_reason")
)
PREEMPTIONS = Family("vllm:num_preemptions_total", "counter", "Sequences preempted for want of KV blocks.", LABELS)
PREFIX_QUERIES = Family(
    "vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.", LABELS
)
PREFIX_HITS = Family("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.", LABELS)
FIRST_TOKEN = Family("vllm:time_to_first_token_seconds", "histogram", "Time to the first token.", LABELS)
INTER_TOKEN = Family("vllm:inter_token_latency_seconds", "histogram", "Time between two tokens of a sequence.", LABELS)
PER_TOKEN = Family(
    "vllm:time_per_output_token_seconds", "histogram", "Mean time of a request's tokens after the first.", LABELS
)
END_TO_END = Family("vllm:e2e_request_latency_seconds", "histogram", "From a request's arrival to its end.", LABELS)
QUEUE = Family("vllm:request_queue_time_seconds", "histogram", "Time that a request waited.", LABELS)
PREFILL = Family("vllm:request_prefill_time_seconds", "histogram", "Time that its prompt took.", LABELS)
DECODE = Family("vllm:request_decode_time_seconds", "histogram", "From its first token to its last.", LABELS)
PROMPT_SIZE = Family("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request.", LABELS)
OUTPUT_SIZE = Family("vllm:request_generation_tokens", "histogram", "Generated tokens of a request.", LABELS)

FAMILIES = (
    RUNNING,
    WAITING,
    KV_USAGE,
    GPU_USAGE,
    CACHE_CONFIG,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    SUCCESS,
    PREEMPTIONS,
    PREFIX_QUERIES,
    PREFIX_HITS,
    FIRST_TOKEN,
    INTER_TOKEN,
    PER_TOKEN,
    END_TO_END,
    QUEUE,
    PREFILL,
    DECODE,
    PROMPT_SIZE,
    OUTPUT_SIZE,
)


def labels(model: str) -> tuple[str, str]:
    return model, ENGINE


def gauges(model: str, num_running: float, num_waiting: float, kv_usage: float) -> Iterator[Sample]:
    """What routers decide by. `kv_usage` is from 0 to 1."""
    label = labels(model)
    yield Sample(RUNNING, num_running, label)
    yield Sample(WAITING, num_waiting, label)
    yield Sample(KV_USAGE, kv_usage, label)
    yield Sample(GPU_USAGE, kv_usage, label)
