"""The generated messages of VllmEngine. Import it only if `is_installed` returned True."""

from typing import Any

from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as smg_common_pb2

# They have no usable type stubs.
engine_pb: Any = vllm_engine_pb2
engine_grpc: Any = vllm_engine_pb2_grpc
common_pb: Any = smg_common_pb2
Message = Any
