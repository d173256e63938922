"""The gateway's other protocols, on the same port."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import grpc

from gateway.gateway import Gateway
from gateway.protocols.kserve import service as kserve
from kvrelay import vllm_engine


def register_all(server: grpc.aio.Server, gateway: Gateway) -> tuple[str, ...]:
    """Adds the services whose libraries are installed and returns their names."""
    kserve.add_kserve(server, gateway)
    names = [kserve.SERVICE_NAME]
    if vllm_engine.is_installed():
        from gateway.protocols.vllm_engine.service import add_vllm_engine

        add_vllm_engine(server, gateway)
        names.append(vllm_engine.SERVICE_NAME)
    return tuple(names)
