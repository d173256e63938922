"""Which roles may call which method and which HTTP route. What is not here is refused."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay.security.principal import Role


@dataclass(frozen=True, slots=True)
class Rule:
    roles: frozenset[Role]
    is_open: bool = False
    """Callers need to prove nothing."""


Rules = Mapping[str, Rule]
"""By "/package.Service/Method" or "GET /path"; GET stands for HEAD too."""

OPEN = Rule(frozenset(Role), is_open=True)
_ANY_ROLE = Rule(frozenset(Role))
_CLIENTS = Rule(frozenset({Role.CLIENT, Role.OPERATOR, Role.FRONT}))
_CLIENTS_AND_GATEWAYS = Rule(_CLIENTS.roles | {Role.GATEWAY})
_OPERATORS = Rule(frozenset({Role.OPERATOR}))
_METRICS = Rule(frozenset({Role.METRICS, Role.OPERATOR}))
_GATEWAYS = Rule(frozenset({Role.GATEWAY}))
_FRONTS = Rule(frozenset({Role.FRONT}))


def _service(name: str, rule: Rule, *methods: str) -> dict[str, Rule]:
    return {f"/{name}/{method}": rule for method in methods}


_INFERENCE = "kvrelay.v1.InferenceService"
_KSERVE = "inference.GRPCInferenceService"

# Kubelets and load balancers send no credentials, and learn only that a process serves. A watch
# lasts, so only known callers may hold one.
_EVERY_PROCESS = _service("grpc.health.v1.Health", OPEN, "Check") | _service(
    "grpc.health.v1.Health", _ANY_ROLE, "Watch", "List"
)
# Of gateways only: all that workers talk to has the protos.
_REFLECTION = _service("grpc.reflection.v1.ServerReflection", _OPERATORS, "ServerReflectionInfo") | _service(
    "grpc.reflection.v1alpha.ServerReflection", _OPERATORS, "ServerReflectionInfo"
)
_VLLM_ENGINE = (
    _service("vllm.grpc.engine.VllmEngine", _FRONTS, "Generate", "Abort", "HealthCheck", "GetModelInfo")
    | _service("vllm.grpc.engine.VllmEngine", _FRONTS, "GetServerInfo", "GetLoads", "GetTokenizer", "Embed")
    | _service("vllm.grpc.engine.VllmEngine", _FRONTS, "FlushCache", "StartProfile", "StopProfile")
    | _service("vllm.grpc.engine.VllmEngine", _FRONTS, "SubscribeKvEvents")
)
# A front hands on the key of the client that asks. smg tells no more of a client.
_VLLM_ENGINE_OF_CLIENTS = _service("vllm.grpc.engine.VllmEngine", _CLIENTS, "Generate", "Abort", "Embed")
_EVERY_WORKER = _EVERY_PROCESS | _VLLM_ENGINE | _service("kvrelay.v1.ModelService", _GATEWAYS, "GetTokenizer")

GRPC_RULES: Mapping[Role, Rules] = {
    Role.GATEWAY: _EVERY_PROCESS
    | _REFLECTION
    | _VLLM_ENGINE
    | _VLLM_ENGINE_OF_CLIENTS
    | _service(_INFERENCE, _CLIENTS, "Generate", "Converse", "GetRequest", "ListRequests")
    | _service(_INFERENCE, _CLIENTS, "Tokenize", "Detokenize", "ListModels")
    | _service(_INFERENCE, _CLIENTS_AND_GATEWAYS, "Resume", "CancelRequest", "GetTimeline")
    # Another gateway asks it for its id, so that it notices its death before the lease ends.
    | _service(_INFERENCE, Rule(frozenset({Role.OPERATOR, Role.GATEWAY})), "GetCluster")
    | _service(_KSERVE, _CLIENTS, "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
    | _service(_KSERVE, _CLIENTS, "ModelConfig", "RepositoryIndex", "ModelInfer", "ModelStreamInfer"),
    Role.PREFILL: _EVERY_WORKER
    # Decode workers ask only where smg uses workers without a gateway.
    | _service("kvrelay.v1.PrefillService", Rule(frozenset({Role.GATEWAY, Role.DECODE})), "Session"),
    Role.DECODE: _EVERY_WORKER
    | _service("kvrelay.v1.DecodeService", _GATEWAYS, "Session")
    | _service("kvrelay.v1.KVTransferService", Rule(frozenset({Role.PREFILL})), "Push", "OfferSharedMemory"),
    # What a front passes on to gateways. Only smg behind it may ask: openai_frontend/relay.py.
    Role.FRONT: _service("vllm.grpc.engine.VllmEngine", _FRONTS, "Generate", "Abort", "Embed", "HealthCheck")
    | _service("vllm.grpc.engine.VllmEngine", _FRONTS, "GetModelInfo", "GetServerInfo", "GetLoads", "GetTokenizer"),
}
"""By the role of the process that is called."""

_HTTP_OF_EVERY_PROCESS = {"GET /healthz": OPEN, "GET /metrics": _METRICS}

OPENAI_ROUTES = (
    *(("POST", path) for path in ("chat/completions", "completions", "responses", "embeddings", "messages")),
    ("POST", "responses/{id}/cancel"),
    *(("GET", path) for path in ("models", "models/{id}", "responses/{id}")),
    ("DELETE", "responses/{id}"),
)
"""What the OpenAI front serves, below /v1/."""

HTTP_RULES: Mapping[Role, Rules] = {
    Role.GATEWAY: _HTTP_OF_EVERY_PROCESS
    | {
        "GET /": _OPERATORS,
        "GET /api/overview": _OPERATORS,
        "GET /api/timelines/{request_id}": _OPERATORS,
        "POST /api/try": _OPERATORS,
    },
    Role.FRONT: {
        f"{method} /v1/{path}": Rule(frozenset({Role.CLIENT, Role.OPERATOR})) for method, path in OPENAI_ROUTES
    }
    | {"GET /health": OPEN, "GET /readiness": OPEN},
    Role.PREFILL: _HTTP_OF_EVERY_PROCESS,
    Role.DECODE: _HTTP_OF_EVERY_PROCESS,
}
