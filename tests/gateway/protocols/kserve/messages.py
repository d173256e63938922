"""ModelInferRequests as clients make them."""

from collections.abc import Mapping

from gateway.protocols.kserve.tensors import raw_texts
from kvrelay.kserve import grpc_service_pb2 as pb


def infer_request(
    values: Mapping[str, str | bytes | bool],
    *,
    raw: bool = True,
    outputs: tuple[str, ...] = (),
    parameters: Mapping[str, str | int | bool] | None = None,
    **fields: str,
) -> pb.ModelInferRequest:
    """A request with BYTES and BOOL inputs, raw as tritonclient sends them, or in contents."""
    request = pb.ModelInferRequest(**fields)  # type: ignore[arg-type]
    for name, value in values.items():
        tensor = request.inputs.add(name=name, datatype="BOOL" if isinstance(value, bool) else "BYTES", shape=[1])
        if raw:
            request.raw_input_contents.append(_raw(value))
        elif isinstance(value, bool):
            tensor.contents.bool_contents.append(value)
        else:
            tensor.contents.bytes_contents.append(value if isinstance(value, bytes) else value.encode())
    for name in outputs:
        request.outputs.add(name=name)
    for name, parameter in (parameters or {}).items():
        request.parameters[name].CopyFrom(infer_parameter(parameter))
    return request


def infer_parameter(value: str | int | bool) -> pb.InferParameter:
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    return pb.InferParameter(int64_param=value) if isinstance(value, int) else pb.InferParameter(string_param=value)


def _raw(value: str | bytes | bool) -> bytes:
    if isinstance(value, bool):
        return bytes([value])
    return raw_texts([value]) if isinstance(value, str) else len(value).to_bytes(4, "little") + value


def texts_of(response: pb.ModelInferResponse, name: str) -> list[str]:
    """Elements of a BYTES output."""
    raw = raw_of(response, name)
    texts = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        texts.append(raw[4:end].decode())
        raw = raw[end:]
    return texts


def numbers_of(response: pb.ModelInferResponse, name: str) -> list[int]:
    """Elements of a UINT32 output."""
    raw = raw_of(response, name)
    return [int.from_bytes(raw[begin : begin + 4], "little") for begin in range(0, len(raw), 4)]


def raw_of(response: pb.ModelInferResponse, name: str) -> bytes:
    (place,) = (number for number, output in enumerate(response.outputs) if output.name == name)
    return response.raw_output_contents[place]
