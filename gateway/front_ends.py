"""Protocols of others that a gateway speaks besides its own: each a service on the same port, over the same request lifecycle."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import grpc

from gateway.kserve import service as kserve
from gateway.relay import Relay
from kvrelay import vllm_engine


def add_front_ends(server: grpc.aio.Server, relay: Relay) -> tuple[str, ...]:
    """Adds those whose libraries are installed; the names of their services."""
    kserve.add_kserve(server, relay)
    names = [kserve.SERVICE_NAME]
    if vllm_engine.is_installed():
        from gateway.vllm_engine.service import add_vllm_engine

        add_vllm_engine(server, relay)
        names.append(vllm_engine.SERVICE_NAME)
    return tuple(names)
