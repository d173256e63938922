"""Turns a ModelInferRequest into a request of InferenceService.Generate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.protocols.kserve import model_description as model
from gateway.protocols.kserve.sampling_json import parse_sampling_json
from gateway.protocols.kserve.tensors import BYTES, bool_element, text_element
from kvrelay.core.bounds import check_count, check_length
from kvrelay.core.quoting import quoted, shortened
from kvrelay.errors import InvalidRequestError, ModelNotFoundError
from kvrelay.kserve import grpc_service_pb2 as pb
from kvrelay.v1 import inference_pb2, session_pb2

TIMEOUT = "timeout"
TENANT = "tenant"
EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
_PARAMETERS = {
    TIMEOUT: ("int64_param", "uint64_param"),
    TENANT: ("string_param",),
    EMPTY_FINAL_RESPONSE: ("bool_param",),
}
_NAMES = {
    "prompt": model.TEXT_INPUT,
    "sampling": model.SAMPLING_PARAMETERS,
    "model": "model_name",
    "tenant": "parameters[tenant]",
}
"""Fields of GenerateRequest to their names in this protocol."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    generate: inference_pb2.GenerateRequest
    request_id: str
    """The client's; may be empty."""
    streams: bool
    includes_input: bool
    outputs: tuple[str, ...]
    """In the order of the answer."""
    timeout_s: float | None

    @property
    def num_sequences(self) -> int:
        return self.generate.sampling.n if self.generate.sampling.HasField("n") else 1


def parse(request: pb.ModelInferRequest) -> InferenceRequest:
    """Raises:
    InvalidRequestError: names the input, output, parameter or field that is wrong.
    ModelNotFoundError: the version is not "1".
    """
    check_length("id", request.id)
    check_version(request.model_name, request.model_version)
    values = _values(request)
    if model.TEXT_INPUT not in values:
        raise InvalidRequestError(model.TEXT_INPUT, "is missing; send the text to continue")
    text = str(values[model.TEXT_INPUT])
    if not text:
        raise InvalidRequestError(model.TEXT_INPUT, "is empty; a prompt needs at least one token")
    sampling = parse_sampling_json(str(values.get(model.SAMPLING_PARAMETERS, "{}")))
    streams = _streams(values)
    includes_input = not values.get(model.EXCLUDE_INPUT, True)
    if streams and includes_input:
        raise InvalidRequestError(
            model.EXCLUDE_INPUT, "is false; it must be true, or absent, where the output is streamed"
        )
    _check_parameters(request)
    tenant = request.parameters[TENANT].string_param if TENANT in request.parameters else ""
    return InferenceRequest(
        generate=inference_pb2.GenerateRequest(model=request.model_name, text=text, sampling=sampling, tenant=tenant),
        request_id=request.id,
        streams=streams,
        includes_input=includes_input,
        outputs=_outputs(request, values, sampling),
        timeout_s=_timeout_s(request),
    )


def check_version(name: str, version: str) -> None:
    if version not in ("", model.MODEL_VERSION):
        problem = f"version {quoted(version)} of model {quoted(name)} is not served"
        raise ModelNotFoundError(f"{problem}; models have one version, {model.MODEL_VERSION}")


@contextmanager
def naming_inputs() -> Iterator[None]:
    """Renames fields in errors."""
    try:
        yield
    except InvalidRequestError as failure:
        first, dot, rest = failure.field.partition(".")
        if first not in _NAMES:
            raise
        name = _NAMES[first] if first == "prompt" else f"{_NAMES[first]}{dot}{rest}"
        raise InvalidRequestError(name, failure.problem) from None


def _values(request: pb.ModelInferRequest) -> dict[str, str | bool]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        problem = f"has {len(raw)} entries for {len(request.inputs)} inputs; send all inputs so or none"
        raise InvalidRequestError("raw_input_contents", problem)
    known = {spec.name: spec.datatype for spec in model.INPUTS}
    values: dict[str, str | bool] = {}
    for number, tensor in enumerate(request.inputs):
        if tensor.name not in known:
            raise _unknown(f"inputs[{number}].name", tensor.name, known)
        if tensor.name in values:
            raise InvalidRequestError(tensor.name, "is there twice; send it once")
        _refuse_parameters(tensor.name, tensor.parameters)
        element = text_element if known[tensor.name] == BYTES else bool_element
        values[tensor.name] = element(tensor, raw[number] if raw else None)
    return values


def _streams(values: dict[str, str | bool]) -> bool:
    given = {bool(values[name]) for name in (model.STREAM, model.STREAMING) if name in values}
    if len(given) > 1:
        raise InvalidRequestError(model.STREAMING, f"says the contrary of {model.STREAM}; send one of them")
    return True in given


def _check_parameters(request: pb.ModelInferRequest) -> None:
    for name, value in request.parameters.items():
        if name not in _PARAMETERS:
            raise InvalidRequestError(
                f"parameters[{shortened(name)}]", f"is not known; these are: {', '.join(_PARAMETERS)}"
            )
        if value.WhichOneof("parameter_choice") not in _PARAMETERS[name]:
            raise InvalidRequestError(f"parameters[{name}]", f"must be sent as {_PARAMETERS[name][0]}")


def _refuse_parameters(tensor: str, parameters: object) -> None:
    for name in parameters:  # type: ignore[attr-defined]
        raise InvalidRequestError(
            f"{tensor}.parameters[{shortened(name)}]", "is not known; tensors have no parameters here"
        )


def _timeout_s(request: pb.ModelInferRequest) -> float | None:
    if TIMEOUT not in request.parameters:
        return None
    value = request.parameters[TIMEOUT]
    timeout_us = value.int64_param or value.uint64_param
    if timeout_us < 0:
        raise InvalidRequestError(f"parameters[{TIMEOUT}]", f"is {timeout_us}; it must be a number of microseconds")
    return timeout_us / 1e6 if timeout_us else None  # 0: no limit


def _outputs(
    request: pb.ModelInferRequest, values: dict[str, str | bool], sampling: session_pb2.SamplingParams
) -> tuple[str, ...]:
    if request.outputs:
        return tuple(_named_outputs(request, sampling))
    wanted = dict.fromkeys(model.DEFAULT_OUTPUTS, True)
    wanted |= {output: bool(values[name]) for name, output in model.RETURNED.items() if name in values}
    wanted[model.LOGPROBS] = sampling.HasField("logprobs")
    return tuple(spec.name for spec in model.OUTPUTS if wanted.get(spec.name))


def _named_outputs(request: pb.ModelInferRequest, sampling: session_pb2.SamplingParams) -> Iterator[str]:
    known = [spec.name for spec in model.OUTPUTS]
    check_count("outputs", request.outputs, len(known))
    for number, output in enumerate(request.outputs):
        if output.name not in known:
            raise _unknown(f"outputs[{number}].name", output.name, known)
        if output.name == model.LOGPROBS and not sampling.HasField("logprobs"):
            problem = f'needs {model.SAMPLING_PARAMETERS} that say how many, such as {{"logprobs": 0}}'
            raise InvalidRequestError(f"outputs[{number}].name", f"{quoted(output.name)} {problem}")
        _refuse_parameters(output.name, output.parameters)
        yield output.name


def _unknown(field: str, name: str, known: Iterable[str]) -> InvalidRequestError:
    return InvalidRequestError(field, f"{quoted(name)} is not known; these are: {', '.join(known)}")
