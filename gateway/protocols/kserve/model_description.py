"""Describes a model's inputs and outputs, which are the same for every model."""

from dataclasses import dataclass

from gateway.protocols.kserve.tensors import BOOL, BYTES, UINT32
from kvrelay.kserve import grpc_service_pb2 as pb

MODEL_VERSION = "1"
"""The only version of every model."""
PLATFORM = "kvrelay"
EXTENSIONS = ("model_configuration", "model_repository", "parameters", "binary_tensor_data")

_DATA_TYPES = {BYTES: pb.TYPE_STRING, BOOL: pb.TYPE_BOOL, UINT32: pb.TYPE_UINT32}

TEXT_INPUT = "text_input"
STREAM = "stream"
STREAMING = "streaming"
SAMPLING_PARAMETERS = "sampling_parameters"
EXCLUDE_INPUT = "exclude_input_in_output"

TEXT_OUTPUT = "text_output"
FINISH_REASON = "finish_reason"
NUM_INPUT_TOKENS = "num_input_tokens"
NUM_OUTPUT_TOKENS = "num_output_tokens"
LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    datatype: str
    optional: bool = True


OUTPUTS = (
    TensorSpec(TEXT_OUTPUT, BYTES),
    TensorSpec(FINISH_REASON, BYTES),
    TensorSpec(NUM_INPUT_TOKENS, UINT32),
    TensorSpec(NUM_OUTPUT_TOKENS, UINT32),
    TensorSpec(LOGPROBS, BYTES),
)
DEFAULT_OUTPUTS = (TEXT_OUTPUT, FINISH_REASON)
RETURNED = {f"return_{name}": name for name in (FINISH_REASON, NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS)}
"""Inputs by which Triton's clients of vLLM choose outputs."""
INPUTS = (
    TensorSpec(TEXT_INPUT, BYTES, optional=False),
    TensorSpec(STREAM, BOOL),
    TensorSpec(STREAMING, BOOL),
    TensorSpec(SAMPLING_PARAMETERS, BYTES),
    TensorSpec(EXCLUDE_INPUT, BOOL),
    *(TensorSpec(name, BOOL) for name in RETURNED),
)
DATATYPES = {spec.name: spec.datatype for spec in (*INPUTS, *OUTPUTS)}


def metadata(name: str) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=name,
        versions=[MODEL_VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=spec.name, datatype=spec.datatype, shape=[1]) for spec in INPUTS],
        outputs=[tensor(name=spec.name, datatype=spec.datatype, shape=[-1]) for spec in OUTPUTS],
    )


def config(name: str) -> pb.ModelConfig:
    return pb.ModelConfig(
        name=name,
        backend=PLATFORM,
        max_batch_size=0,
        input=[
            pb.ModelInput(name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=[1], optional=spec.optional)
            for spec in INPUTS
        ],
        output=[pb.ModelOutput(name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=[-1]) for spec in OUTPUTS],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
    )
