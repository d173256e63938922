"""vllm.grpc.engine.VllmEngine, by which smg (https://github.com/smg-project/smg) and its like talk to engines: what gateways and
workers share of serving it. Its messages come from the package smg-grpc-proto, of the extra `openai`.

Only `messages` imports that package; whoever serves without it asks `is_installed` first.
"""

from importlib.util import find_spec

SERVICE_NAME = "vllm.grpc.engine.VllmEngine"


def service_names() -> tuple[str, ...]:
    """The service's name where it is installed."""
    return (SERVICE_NAME,) if is_installed() else ()


def is_installed() -> bool:
    """Whether the service's messages are there: the extra `openai`."""
    return find_spec("smg_grpc_proto") is not None
