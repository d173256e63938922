"""Elements of tensors: raw, or in the field of their type."""

from collections.abc import Sequence
from typing import TypeVar

from kvrelay.core.quoting import quoted, shortened
from kvrelay.errors import InvalidRequestError
from kvrelay.kserve import grpc_service_pb2 as pb

BYTES = "BYTES"
BOOL = "BOOL"
UINT32 = "UINT32"
LENGTH_BYTES = 4
"""Little-endian, before each element of a raw BYTES tensor."""

MAX_DIMENSIONS = 8

Tensor = pb.ModelInferRequest.InferInputTensor
_Element = TypeVar("_Element")


def text_element(tensor: Tensor, raw: bytes | None) -> str:
    """The only text of a BYTES tensor; `raw` if it was sent as raw bytes.

    Raises:
        InvalidRequestError: names the input that is wrong.
    """
    _check_type(tensor, BYTES)
    data = _one(tensor, tensor.contents.bytes_contents if raw is None else _split(tensor.name, raw))
    try:
        return data.decode()
    except UnicodeDecodeError as failure:
        problem = f"is not UTF-8: {failure.reason} at byte {failure.start}; send it as UTF-8"
        raise InvalidRequestError(tensor.name, problem) from None


def bool_element(tensor: Tensor, raw: bytes | None) -> bool:
    """The same for BOOL."""
    _check_type(tensor, BOOL)
    return bool(_one(tensor, tensor.contents.bool_contents if raw is None else raw))


def _check_type(tensor: Tensor, datatype: str) -> None:
    if tensor.datatype != datatype:
        raise InvalidRequestError(tensor.name, f"has the datatype {quoted(tensor.datatype)}; it must be {datatype}")


def _one(tensor: Tensor, elements: Sequence[_Element]) -> _Element:
    # Clients that count the batch send one more 1 in the shape.
    too_deep = len(tensor.shape) > MAX_DIMENSIONS
    if too_deep or any(size != 1 for size in tensor.shape) or len(elements) != 1:
        shape = shortened(", ".join(map(str, tensor.shape[:MAX_DIMENSIONS])))
        problem = (
            f"has the shape [{shape}] and {len(elements)} elements; send one, with shape [1], and a request for each"
        )
        raise InvalidRequestError(tensor.name, problem)
    return elements[0]


def _split(name: str, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    while position < len(raw) and len(elements) < 2:  # one is taken, so two are too many
        begin = position + LENGTH_BYTES
        position = begin + int.from_bytes(raw[position:begin], "little")
        if begin > len(raw) or position > len(raw):
            raise InvalidRequestError(
                name, f"ends within an element: {len(raw)} bytes; send each one's length in 4 bytes before it"
            )
        elements.append(raw[begin:position])
    return elements


def raw_texts(texts: Sequence[str]) -> bytes:
    elements = [text.encode() for text in texts]
    return b"".join([len(element).to_bytes(LENGTH_BYTES, "little") + element for element in elements])


def raw_numbers(numbers: Sequence[int]) -> bytes:
    return b"".join([number.to_bytes(4, "little") for number in numbers])
