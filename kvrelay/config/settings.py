"""Declares every setting of every process once. `kvrelay.config.sources` reads them.

A process gets one object with a part for each concern: `DecodeSettings(server=..., engine=...)`.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kvrelay.config.base import Settings
from kvrelay.config.connection_settings import ConnectionSettings
from kvrelay.config.decoding_settings import DecodingSettings
from kvrelay.config.model_settings import ModelSettings
from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.config.redis_settings import RedisSettings
from kvrelay.config.security_settings import ClientTLSSettings, PeerSettings, SecuritySettings
from kvrelay.network.connection_limits import ConnectionLimits
from kvrelay.network.host_port import join_host_port, split_host_port
from kvrelay.network.http_bounds import HostNames
from kvrelay.network.listening import ANY_HOST, is_loopback
from kvrelay.network.own_address import own_address
from kvrelay.runtime.cpu_cores import CORES_PATTERN

BYTES_PER_MIB = 1024 * 1024
DEFAULT_GATEWAY_PORT = 50050
HTTP_PORT_ABOVE = 30
"""`serve all` adds this to the gRPC port of its gateway: 50080 by default."""
MAX_COALESCE_MS = 50
"""Up to this delay a person still sees tokens come one by one."""


def _host_to_listen_on(text: str) -> str:
    host, port = split_host_port(text)
    if port is not None:
        raise ValueError("it has a port, which is a setting of its own: --port")
    return host


def _address(text: str) -> str:
    split_host_port(text)
    return text


class ServerSettings(RedisSettings):
    """Where a process listens, what it logs, how others find it and how it ends."""

    host: Annotated[str, AfterValidator(_host_to_listen_on)] = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 or :: for all."
    )
    port: int = Field(default=0, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    http_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port for HTTP: /metrics and /healthz; 0 takes a free one. "
        "Default: none; with `serve all` the gateway's --port + 30.",
    )
    http_allowed_hosts: str | None = Field(
        default=None,
        description="Names under which HTTP may be asked, separated by commas, besides --host, --advertise-address, "
        "addresses and names without a dot; .example.org stands for all below it, * for all.",
    )
    vllm_metrics: bool = Field(default=False, description="Serve /metrics under the names that vLLM uses, too.")
    otlp_endpoint: str | None = Field(
        default=None,
        description="URL of an OpenTelemetry collector, such as http://127.0.0.1:4318: it gets requests' spans, as "
        "OTLP over HTTP.",
    )
    advertise_address: Annotated[str, AfterValidator(_address)] | None = Field(
        default=None,
        description="host:port under which others reach this process; its port defaults to --port. "
        "Default: --host and --port; with 0.0.0.0 and ::, the address by which this machine reaches Redis.",
    )
    lease_ms: int = Field(
        default=6000, ge=500, description="How long a process counts as alive after the last renewal of its lease."
    )
    liveness_window_ms: int = Field(
        default=1500, ge=100, description="How long a session's peer may be silent until it counts as gone."
    )
    watchdog_socket: str | None = Field(
        default=None,
        description="Unix datagram socket that gets a heartbeat each second: systemd's NOTIFY_SOCKET, or that of "
        "`serve all`.",
    )
    drain_timeout_ms: int = Field(default=25000, ge=0, description="Most time for running jobs to end after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console for people, json for programs."
    )
    fault_points: str | None = Field(
        default=None,
        description="For tests only: folder through which kvrelay.testing makes named steps of this process fail.",
    )

    def host_names_of(self, address: str) -> HostNames:
        """Names of the HTTP port; `address` is the process's own for others."""
        advertised, _ = split_host_port(address)
        return HostNames((self.host, advertised, *(self.http_allowed_hosts or "").split(",")))

    def address_of(self, bound_port: int) -> str:
        """host:port under which others reach this process. May ask the resolver."""
        if self.advertise_address is not None:
            host, port = split_host_port(self.advertise_address)
            return join_host_port(host, bound_port if port is None else port)
        return join_host_port(own_address(self.redis_url) if self.host in ANY_HOST else self.host, bound_port)


class EngineSettings(ModelSettings):
    """The model, the memory of its KV cache, and the limits of a step."""

    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens per KV block.")
    kv_cache_mib: int = Field(default=1024, ge=1, description="Memory for KV blocks, in MiB.")
    num_kv_blocks: int | None = Field(default=None, ge=2, description="Number of KV blocks; overrides kv-cache-mib.")
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of the engine. Default: one per core of --cores; without it, half of the machine's "
        "cores, or the container's quota.",
    )
    cores: str | None = Field(
        default=None,
        pattern=CORES_PATTERN,
        description="Cores for the engine's threads, such as 0-1,3. Default: any; `serve all` divides the machine's.",
    )
    core_sharing_file: str | None = Field(
        default=None,
        description="File through which workers with --cores lend each other idle cores; made when missing.",
    )
    max_context_tokens: int | None = Field(default=None, ge=2, description="Longest sequence. Default: the model's.")
    prefill_chunk_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens computed in one step. Default: what takes 0.1 s, 128 to 1024; where kernels do "
        "not compute the whole model, 256.",
    )
    max_running_sequences: int = Field(default=64, ge=1, description="Most sequences in one step.")
    max_waiting_works: int = Field(
        default=256,
        ge=1,
        description="Most jobs that wait for blocks, in equal parts for gateways that want them; more are refused.",
    )
    step_timeout_ms: int = Field(
        default=60000,
        ge=100,
        description="A step that takes longer hangs: the worker ends, and its jobs go elsewhere.",
    )
    prefix_cache: bool = Field(
        default=True, description="Keep the KV of prompts for later prompts with the same beginning."
    )


class TransferSettings(Settings):
    transfer_transport: Literal["auto", "grpc", "shared-memory"] = Field(
        default="auto",
        description="How KV payloads travel: auto uses shared memory to a decode worker on the same host and gRPC "
        "to others, grpc always gRPC, shared-memory nothing else, so that a transfer to another host fails.",
    )
    transfer_window_mib: int = Field(default=32, ge=1, description="Most unacknowledged KV per request, in MiB.")
    transfer_message_kib: int = Field(
        default=4096, ge=16, le=7168, description="Largest KV payload of one message, in KiB."
    )
    transfer_connect_timeout_ms: int = Field(default=2000, ge=1, description="Most time to reach a decode worker.")


class RequestSettings(Settings):
    """What a gateway admits, and how it routes and retries."""

    max_running_requests: int = Field(
        default=256, ge=1, description="Most requests in progress; more are refused with RESOURCE_EXHAUSTED."
    )
    max_queued_prompt_tokens: int = Field(
        default=262144, ge=1, description="Most prompt tokens of requests that wait for their first token."
    )
    default_timeout_ms: int = Field(default=300000, ge=1, description="Deadline of a request whose client sets none.")
    max_timeout_ms: int = Field(default=3600000, ge=1, description="Longest deadline; longer ones are shortened to it.")
    local_prefill_tokens: int | None = Field(
        default=None,
        ge=0,
        description="The decode worker computes prompts with fewer uncached tokens itself. Default: depends on the "
        "load.",
    )
    routing: Literal["prefix", "load", "two-choices", "round-robin", "session"] = Field(
        default="prefix",
        description="How workers are chosen: prefix prefers those that have the prompt's beginning cached, and goes "
        "by load without any; session sends equal keys in the metadata kvrelay-session to the same workers.",
    )
    max_attempts: int = Field(
        default=8,
        ge=1,
        description="Most attempts at one request; refusals by full or draining workers do not count.",
    )
    worker_wait_ms: int = Field(
        default=30000, ge=0, description="How long a request waits for a worker of its model to appear."
    )
    coalesce_ms: int = Field(
        default=0,
        ge=0,
        le=MAX_COALESCE_MS,
        description="How long a stream's tokens may be gathered into one message; requests may override it.",
    )
    max_unread_tokens: int = Field(
        default=1024,
        ge=1,
        description="A stream pauses while its client has more unread tokens than this.",
    )
    slow_client_timeout_ms: int = Field(
        default=30000, ge=1, description="A stream that pauses for longer ends with RESOURCE_EXHAUSTED."
    )
    resume_grace_ms: int = Field(
        default=60000, ge=0, description="How long a resumable request runs on without any client."
    )
    timeline_requests: int = Field(
        default=256, ge=1, description="Number of requests whose timeline is kept; each takes a few kB, at most 150."
    )
    try_box: bool | None = Field(
        default=None,
        # A column for --no-try-box would leave other names in the panel no room on 80 columns.
        json_schema_extra={"panel": "Live page settings"},
        description="Accept prompts typed on the live page, from every client of the HTTP port. "
        "Default: on if --host is a loopback address.",
    )
    trace_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of requests to trace if their clients do not decide; see --otlp-endpoint.",
    )
    retention_ms: int = Field(
        default=600000, ge=1000, description="How long an ended request is kept, without its prompt."
    )
    keep_outputs: bool = Field(
        default=False,
        json_schema_extra={"panel": "Stored output settings"},
        description="Keep the prompts of running and the outputs of all requests in Redis, the outputs for "
        "--retention-ms, not only of requests that are resumable or have an idempotency key.",
    )


class GatewaySettings(Settings):
    server: ServerSettings = ServerSettings(port=DEFAULT_GATEWAY_PORT)
    requests: RequestSettings = RequestSettings()
    connections: ConnectionSettings = ConnectionSettings()
    quotas: QuotaSettings = QuotaSettings()
    security: SecuritySettings = SecuritySettings()
    peers: PeerSettings = PeerSettings()

    @property
    def connection_limits(self) -> ConnectionLimits:
        """One connection, as a front has, can use all places."""
        return self.connections.limits(self.requests.max_running_requests)

    @property
    def has_peer_port(self) -> bool:
        """With certificates, for processes that have some, too."""
        return self.security.takes_keys or self.peers.local_clients

    @property
    def takes_typed_prompts(self) -> bool:
        """Whether the live page has a box for prompts. By default only users of this machine get
        it.
        """
        chosen = self.requests.try_box
        return is_loopback(self.server.host) if chosen is None else chosen


class PrefillSettings(Settings):
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    transfer: TransferSettings = TransferSettings()
    security: SecuritySettings = SecuritySettings()


class DecodeSettings(Settings):
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    decoding: DecodingSettings = DecodingSettings()
    security: SecuritySettings = SecuritySettings()


class OpenAIAccessSettings(Settings):
    """Keys of OpenAI's HTTP API, and arguments of smg behind it."""

    openai_api_key: str | None = Field(
        default=None,
        description="Keys, separated by commas, of which a client of OpenAI's API must send one. Other users see "
        "flags, but not "
        "the environment. Default: none, and every client has access.",
    )
    openai_args: str | None = Field(
        default=None, description="More arguments for smg, quoted as in a shell, such as '--tool-call-parser llama'."
    )
    openai_allowed_hosts: str | None = Field(
        default=None,
        description="Names under which OpenAI's API may be asked without a key, separated by commas, besides the "
        "address to listen on, addresses and names without a dot; .example.org stands for all below it, * for all.",
    )
    openai_max_body_kib: int = Field(
        default=2048, ge=1, le=65536, description="Longest body of a request to OpenAI's API, in KiB."
    )


class ClusterSettings(OpenAIAccessSettings):
    """What `serve all` adds to the settings of its processes."""

    num_prefill: int = Field(default=1, ge=0, le=64, description="Prefill workers to start.")
    num_decode: int = Field(default=1, ge=1, le=64, description="Decode workers to start.")
    openai_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port for OpenAI's HTTP API; 0 takes a free one. Default: none. Needs the extra openai.",
    )
    startup_timeout_s: float = Field(
        default=180.0, gt=0, description="Most time until all processes are up, in seconds."
    )
    restart: bool = Field(
        default=True, description="Restart a process, with back-off, when it ends by itself or hangs."
    )
    hang_timeout_s: float = Field(
        default=10.0,
        ge=3.0,
        description="A process without a heartbeat for this long hangs, in seconds; see --restart.",
    )


class OpenAISettings(OpenAIAccessSettings):
    host: Annotated[str, AfterValidator(_host_to_listen_on)] = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 or :: for all."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    gateway: str = Field(
        default=f"127.0.0.1:{DEFAULT_GATEWAY_PORT}",
        min_length=1,
        description="host:port of the gateway; several, separated by commas.",
    )
    gateway_key_file: str | None = Field(
        default=None, description="File with the front's own key, of role front, for gateways that take keys."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console for people, json for programs."
    )
    local_clients: bool = Field(
        default=False,
        description="Take every caller for a user of this machine, who needs no key and no TLS, as on loopback: for a "
        "port that Docker publishes on 127.0.0.1.",
    )
    security: SecuritySettings = SecuritySettings()


class ClientSettings(ClientTLSSettings):
    gateway: str = Field(
        json_schema_extra={"flags": ["--address"]},
        default=f"127.0.0.1:{DEFAULT_GATEWAY_PORT}",
        min_length=1,
        description="host:port of the gateway, by default port 50050; several, separated by commas.",
    )
    timeout_s: float = Field(
        default=300.0,
        gt=0,
        json_schema_extra={"flags": ["--timeout"]},
        description="Most time for the call, in seconds.",
    )
    proxy: Literal["none", "environment"] = Field(
        default="none", description="HTTP proxy to the gateway: environment uses grpc_proxy, https_proxy or http_proxy."
    )
    api_key_file: str | None = Field(
        default=None, description="File with the API key; without TLS, only a gateway on this machine gets it."
    )
