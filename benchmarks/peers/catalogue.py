"""Which engines are compared, how each is run, and what it is asked to do. Values only."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.errors import ConfigError

ALL_WORKLOADS = ("w1", "ttft", "w2", "w3")
ONE_BATCH = ("w1", "ttft", "w2")
"""For what has no continuous batching."""
CHUNKS_MATTER = ("ttft", "w2", "w3")
"""Decode of one stream does not depend on the size of prompt chunks."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One engine with one set of settings.

    Whoever compares must compare like with like: `weights` is the class of a peer, f32, bf16 or 8
    bits.
    """

    name: str
    title: str
    environment: str | None
    """Its virtual environment; None is this one."""
    adapter: str
    """Module in benchmarks.peers.adapters."""
    weights: str = "f32"
    chunk_tokens: int | None = None
    """Most tokens of one step; None is the engine's own default."""
    workloads: tuple[str, ...] = ALL_WORKLOADS
    min_cores: int = 1
    conversion: str | None = None
    """What its model is converted into: see `model_conversion`. None reads the folder as it is."""


PEERS: tuple[Peer, ...] = (
    Peer("kvrelay", "kvrelay, engine alone, f32", None, "kvrelay_engine"),
    Peer("kvrelay-bf16", "kvrelay, engine alone, bf16", None, "kvrelay_engine", "bf16"),
    Peer("kvrelay-int8", "kvrelay, engine alone, int8", None, "kvrelay_engine", "int8"),
    Peer("kvrelay-service", "kvrelay, service, f32", None, "kvrelay_service", min_cores=2),
    Peer("kvrelay-service-bf16", "kvrelay, service, bf16", None, "kvrelay_service", "bf16", min_cores=2),
    Peer("kvrelay-service-int8", "kvrelay, service, int8", None, "kvrelay_service", "int8", min_cores=2),
    Peer("openvino", "OpenVINO GenAI f32, chunks of 256", "openvino", "openvino_genai", "f32", 256, conversion="f16"),
    Peer(
        "openvino-512",
        "OpenVINO GenAI f32, chunks of 512",
        "openvino",
        "openvino_genai",
        "f32",
        512,
        CHUNKS_MATTER,
        1,
        "f16",
    ),
    Peer(
        "openvino-q8",
        "OpenVINO GenAI Q8_0, chunks of 256",
        "openvino",
        "openvino_genai",
        "q8_0",
        256,
        conversion="q8_0",
    ),
    Peer(
        "openvino-bf16",
        "OpenVINO GenAI bf16, chunks of 256",
        "openvino",
        "openvino_genai",
        "bf16",
        256,
        conversion="f16",
    ),
    Peer(
        "openvino-bf16-512",
        "OpenVINO GenAI bf16, chunks of 512",
        "openvino",
        "openvino_genai",
        "bf16",
        512,
        CHUNKS_MATTER,
        1,
        "f16",
    ),
    Peer("llama-cpp", "llama.cpp f32", "llama-cpp", "llama_server", "f32", conversion="f32"),
    Peer(
        "llama-cpp-256",
        "llama.cpp f32, chunks of 256",
        "llama-cpp",
        "llama_server",
        "f32",
        256,
        CHUNKS_MATTER,
        1,
        "f32",
    ),
    Peer("llama-cpp-bf16", "llama.cpp bf16", "llama-cpp", "llama_server", "bf16", conversion="bf16"),
    Peer("llama-cpp-q8", "llama.cpp Q8_0", "llama-cpp", "llama_server", "q8_0", conversion="q8_0"),
    Peer(
        "llama-cpp-q8-256",
        "llama.cpp Q8_0, chunks of 256",
        "llama-cpp",
        "llama_server",
        "q8_0",
        256,
        CHUNKS_MATTER,
        1,
        "q8_0",
    ),
    Peer(
        "ctranslate2",
        "CTranslate2 f32",
        "ctranslate2",
        "ctranslate2_generator",
        workloads=ONE_BATCH,
        conversion="ctranslate2",
    ),
    Peer("vllm", "vLLM f32", "vllm", "vllm_server"),
    Peer("vllm-256", "vLLM f32, chunks of 256", "vllm", "vllm_server", "f32", 256, CHUNKS_MATTER),
    Peer("vllm-bf16", "vLLM bf16", "vllm", "vllm_server", "bf16"),
    Peer("transformers", "transformers f32, generate", "transformers", "transformers_generate", workloads=ONE_BATCH),
    Peer(
        "transformers-batching",
        "transformers f32, continuous batching, chunks of 256",
        "transformers",
        "transformers_batching",
        "f32",
        256,
    ),
)


def choose_peers(names: str) -> list[Peer]:
    """Peers by their names, separated by commas, in that order; `all` is every one, `kvrelay*`
    those that begin so.

    Raises:
        ConfigError: there is none of that name.
    """
    chosen: dict[str, Peer] = {}
    for name in _split(names):
        found = [peer for peer in PEERS if _matches(peer.name, name)]
        if not found:
            raise ConfigError(f"there is no peer {name!r}; there are {', '.join(peer.name for peer in PEERS)}")
        chosen |= {peer.name: peer for peer in found}
    return list(chosen.values())


def choose_workloads(names: str) -> list[str]:
    """Workloads by their names, separated by commas, in the order of ALL_WORKLOADS; `all` is every
    one.

    Raises:
        ConfigError: there is none of that name.
    """
    wanted = _split(names)
    for name in wanted:
        if name not in ("all", *ALL_WORKLOADS):
            raise ConfigError(f"there is no workload {name!r}; there are {', '.join(ALL_WORKLOADS)}")
    return [name for name in ALL_WORKLOADS if name in wanted or "all" in wanted]


def _split(names: str) -> Sequence[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _matches(name: str, pattern: str) -> bool:
    return pattern == "all" or name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))
