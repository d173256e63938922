"""The generated messages of VllmEngine: the one place that imports them. Import it only where `is_installed` said so."""

from typing import Any

from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as smg_common_pb2

# Their stubs are not made for type checkers.
engine_pb: Any = vllm_engine_pb2
engine_grpc: Any = vllm_engine_pb2_grpc
common_pb: Any = smg_common_pb2
Message = Any
"""A message of the service."""
