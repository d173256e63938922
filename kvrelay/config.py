"""Every setting of every process, each declared once. Only `kvrelay.settings_sources` reads command line, environment and file.

A process gets one object composed of the concerns it has: `DecodeSettings(server=..., engine=..., ...)`.
"""

import socket
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kvrelay.core_set import CORES_PATTERN

DEFAULT_GATEWAY_PORT = 50050
HTTP_PORT_ABOVE = 30
"""Of `serve all`: its gateway's HTTP port is so far above the one for gRPC, 50080 by default."""
ANY_HOST = ("0.0.0.0", "::", "[::]")
"""Hosts that stand for all addresses of a machine, and are none that others reach it by."""
MAX_COALESCE_MS = 50
"""Tokens are never held back for longer: a person sees them come one by one up to about there."""


class Settings(BaseModel):
    """Base of all of them: frozen, and closed against keys that do not exist."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ServerSettings(Settings):
    """What every process has: where it listens, what it logs, how it is found and how it ends."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=0, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    http_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port for HTTP: /metrics and /healthz; 0 takes a free one. "
        "Default: none; with `serve all` the gateway's --port + 30.",
    )
    vllm_metrics: bool = Field(default=False, description="Serve /metrics under the names that vLLM uses, too.")
    otlp_endpoint: str | None = Field(
        default=None,
        description="URL of an OpenTelemetry collector, such as http://127.0.0.1:4318: gets requests' spans, as OTLP over HTTP.",
    )
    advertise_address: str | None = Field(
        default=None, description="host:port under which others reach this process. Default: the host and port listened on."
    )
    redis_url: str | None = Field(
        default=None, description="Redis or Valkey, such as redis://127.0.0.1:6379/0. Needed by every process."
    )
    redis_timeout_ms: int = Field(default=200, ge=1, description="Most time for one Redis operation.")
    lease_ms: int = Field(default=6000, ge=500, description="How long a process counts as alive after its last sign in Redis.")
    liveness_window_ms: int = Field(
        default=1500, ge=100, description="How long a session's peer may be silent before it counts as gone."
    )
    watchdog_socket: str | None = Field(
        default=None,
        description="Unix datagram socket for a sign of life each second: systemd's NOTIFY_SOCKET, or that of `serve all`.",
    )
    drain_timeout_ms: int = Field(default=25000, ge=0, description="How long running work may take to end after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    log_format: Literal["console", "json"] = Field(default="console", description="console for people, json for programs.")
    fault_points: str | None = Field(
        default=None,
        description="For tests only: the folder through which kvrelay.testing makes named steps of this process fail.",
    )

    def address_of(self, bound_port: int) -> str:
        """host:port under which others reach the process that listens on that port."""
        host = socket.gethostname() if self.host in ANY_HOST else self.host
        return self.advertise_address or f"{host}:{bound_port}"


class EngineSettings(Settings):
    """The model, the memory for its KV cache, and how much of either a step may use."""

    model: str = Field(
        default="smollm2-135m-instruct", description="Model: a name in the model store, a folder, a GGUF file or a hub name."
    )
    served_model_name: str | None = Field(default=None, description="Name that clients ask for. Default: the model's own.")
    model_dir: str | None = Field(
        default=None, description="The model store's folder. Default: kvrelay/models in the user's cache folder."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute; auto takes cuda when there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of weights and KV; auto is float32 on cpu and the model's own on cuda."
    )
    kernels: Literal["auto", "off"] = Field(
        default="auto", description="auto compiles kernels for float32 and int8 on the CPU; off leaves everything to torch."
    )
    quantize: Literal["none", "int8"] = Field(
        default="none", description="int8 quantizes weights and activations; the same on all workers of a model."
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        default="auto",
        description="Type that KV is kept and shipped in; auto is what the model computes in, int8 needs the kernels.",
    )
    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens per KV block.")
    kv_cache_mib: int = Field(default=1024, ge=1, description="Memory for KV blocks, in MiB.")
    num_kv_blocks: int | None = Field(default=None, ge=2, description="Number of KV blocks; overrides kv-cache-mib.")
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of the engine. Default: one for each of its cores, or half of the machine's.",
    )
    cores: str | None = Field(
        default=None,
        pattern=CORES_PATTERN,
        description="Cores that the engine's threads keep to, such as 0-1,3. Default: any; `serve all` divides the machine's.",
    )
    core_board: str | None = Field(
        default=None,
        description="File through which workers with cores of their own lend each other idle ones; made when missing.",
    )
    max_context_tokens: int | None = Field(
        default=None, ge=2, description="Longest sequence. Default: what the model was made for."
    )
    prefill_chunk_tokens: int = Field(default=256, ge=1, description="Most prompt tokens computed in one step.")
    max_running_sequences: int = Field(default=64, ge=1, description="Most sequences in one step.")
    max_waiting_works: int = Field(default=256, ge=1, description="Most works that wait for room; more are refused.")
    step_timeout_ms: int = Field(
        default=60000, ge=100, description="A step that takes longer hangs: the worker ends, and its work goes elsewhere."
    )
    prefix_cache: bool = Field(default=True, description="Keep the KV of prompts for later prompts that begin alike.")


class TransferSettings(Settings):
    """How KV travels."""

    transfer_transport: Literal["auto", "grpc", "shared-memory"] = Field(
        default="auto",
        description="How KV payloads travel: through shared memory to a decode worker on the same host and over gRPC to others "
        "(auto), always over gRPC, or through shared memory only, so that a transfer to another host fails.",
    )
    transfer_window_mib: int = Field(
        default=32, ge=1, description="Most KV on the wire and not yet acknowledged, per request, in MiB."
    )
    transfer_message_kib: int = Field(default=4096, ge=16, le=7168, description="Largest KV payload of one message, in KiB.")
    transfer_connect_timeout_ms: int = Field(default=2000, ge=1, description="Most time to reach a decode worker.")


class DecodingSettings(Settings):
    """How a decode worker fills its steps besides one token of every sequence."""

    local_prefill_chunk_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens in a step in which sequences decode. Default: 16 on cpu, prefill-chunk-tokens on cuda.",
    )
    speculative_tokens: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Most tokens that are guessed per sequence and step, by prompt lookup; 0 guesses none.",
    )
    speculative_max_rows: int = Field(
        default=16, ge=2, description="Guesses are added to a step up to so many tokens in it, of all sequences together."
    )


class RelaySettings(Settings):
    """What a gateway admits and how it routes and retries."""

    max_running_requests: int = Field(
        default=256, ge=1, description="Most requests in progress; more are refused with RESOURCE_EXHAUSTED."
    )
    max_queued_prompt_tokens: int = Field(default=262144, ge=1, description="Most prompt tokens that wait for their first token.")
    default_timeout_ms: int = Field(default=300000, ge=1, description="Deadline of a request whose client set none.")
    max_timeout_ms: int = Field(default=3600000, ge=1, description="Longest deadline; longer ones are cut to it.")
    local_prefill_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Prompts with fewer uncached tokens are computed by the decode worker itself. Default: by their loads.",
    )
    max_attempts: int = Field(
        default=8, ge=1, description="Most attempts at one request; those refused by full or draining workers do not count."
    )
    worker_wait_ms: int = Field(default=30000, ge=0, description="How long a request waits for a worker of its model to appear.")
    coalesce_ms: int = Field(
        default=0,
        ge=0,
        le=MAX_COALESCE_MS,
        description="For how long tokens of a stream may be gathered into one message; requests may say otherwise.",
    )
    max_unread_tokens: int = Field(
        default=1024, ge=1, description="A stream whose client is further behind than so many tokens pauses until it is not."
    )
    slow_client_timeout_ms: int = Field(
        default=30000, ge=1, description="A stream that pauses for so long ends with RESOURCE_EXHAUSTED."
    )
    resume_grace_ms: int = Field(default=60000, ge=0, description="How long a resumable request runs on without any client.")
    timeline_requests: int = Field(
        default=256, ge=1, description="Requests whose timeline is kept; each takes some kB, 150 at the most."
    )
    trace_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of requests that are traced where their clients say nothing; see --otlp-endpoint.",
    )
    retention_ms: int = Field(default=3600000, ge=1000, description="How long an ended request is known.")


class GatewaySettings(Settings):
    """A gateway process."""

    server: ServerSettings = ServerSettings(port=DEFAULT_GATEWAY_PORT)
    relay: RelaySettings = RelaySettings()


class PrefillSettings(Settings):
    """A prefill worker process."""

    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    transfer: TransferSettings = TransferSettings()


class DecodeSettings(Settings):
    """A decode worker process."""

    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    decoding: DecodingSettings = DecodingSettings()


class ClusterSettings(Settings):
    """What `serve all` adds to the settings of the processes that it starts."""

    num_prefill: int = Field(default=1, ge=0, le=64, description="Prefill workers to start.")
    num_decode: int = Field(default=1, ge=1, le=64, description="Decode workers to start.")
    openai_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port for OpenAI's HTTP API; 0 takes a free one. Default: none. Needs the extra openai.",
    )
    startup_timeout_s: float = Field(default=180.0, gt=0, description="Most time until everything is up, in seconds.")
    restart: bool = Field(default=True, description="Start a process again, with back-off, when it ends by itself or hangs.")
    hang_timeout_s: float = Field(
        default=10.0, ge=3.0, description="A process that gives no sign of life for so long hangs, in seconds; see --restart."
    )


class ClientSettings(Settings):
    """What the commands have that talk to a gateway."""

    gateway: str = Field(
        json_schema_extra={"flags": ["--address"]},
        default=f"127.0.0.1:{DEFAULT_GATEWAY_PORT}",
        min_length=1,
        description="host:port of the gateway; several, separated by commas.",
    )
    timeout_s: float = Field(
        default=300.0, gt=0, json_schema_extra={"flags": ["--timeout"]}, description="Most time for the call, in seconds."
    )
