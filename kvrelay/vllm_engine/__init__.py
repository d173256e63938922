"""What gateways and workers share to serve vllm.grpc.engine.VllmEngine, by which smg talks to
engines.

smg: https://github.com/smg-project/smg. Only `messages` imports smg-grpc-proto, of the extra
`openai`; check `is_installed` first.
"""

from importlib.util import find_spec

SERVICE_NAME = "vllm.grpc.engine.VllmEngine"


def service_names() -> tuple[str, ...]:
    return (SERVICE_NAME,) if is_installed() else ()


def is_installed() -> bool:
    return find_spec("smg_grpc_proto") is not None
