"""KV chunks as bytes on the wire, decoded without a copy of the payload."""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash
from google.protobuf.message import DecodeError

from kvrelay.core.job import SequenceToken
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.wire.convert import finish_reason_to_pb

TICKET_BYTES = 16
DIGEST_BYTES = 16

Buffer = bytes | bytearray | memoryview

# ticket length, attempt, layers, tokens, payload length: fixed widths, so that different chunks
# never give the same bytes.
_FRAME = struct.Struct("<QQQQQQQ")
# ticket length, attempt, number of chunks, number of tokens; for each token: sequence, index, id,
# finish reason, has log probability, log probability, number of alternatives; for each of these:
# id, log probability.
_END_FRAME = struct.Struct("<QQQQ")
_TOKEN_FRAME = struct.Struct("<QQQQ?fQ")
_ALTERNATIVE_FRAME = struct.Struct("<Qf")
_LENGTH_DELIMITED = 2
_MAX_VARINT_BYTES = 10
_CHUNK_TAG = kv_transfer_pb2.PushRequest.CHUNK_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_PAYLOAD_TAG = kv_transfer_pb2.KVChunk.PAYLOAD_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_new_bytes.restype = ctypes.py_object
_address_of = ctypes.pythonapi.PyBytes_AsString
_address_of.argtypes = (ctypes.py_object,)
_address_of.restype = ctypes.c_void_p


@dataclass(frozen=True, slots=True)
class SharedSlice:
    """In a push's region of shared memory."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The payload is [layers, 2, tokens, kv_heads, head_dim]."""

    span: KVSpan
    payload: Buffer
    digest: bytes


@dataclass(frozen=True, slots=True)
class SharedChunk:
    """Its payload is in shared memory."""

    span: KVSpan
    where: SharedSlice
    digest: bytes


def chunk_digest(ticket: bytes, attempt: int, span: KVSpan, payload: Buffer) -> bytes:
    """xxh3-128 over ticket, attempt, layer range, token range and payload."""
    hasher = xxhash.xxh3_128()
    hasher.update(
        _FRAME.pack(
            len(ticket),
            attempt,
            span.layer_begin,
            span.layer_end,
            span.token_begin,
            span.token_end,
            memoryview(payload).nbytes,
        )
    )
    hasher.update(ticket)
    hasher.update(payload)
    return hasher.digest()


def end_digest(ticket: bytes, attempt: int, num_chunks: int, tokens: Sequence[SequenceToken]) -> bytes:
    """xxh3-128 over ticket, attempt and all that a push's end says."""
    hasher = xxhash.xxh3_128(_END_FRAME.pack(len(ticket), attempt, num_chunks, len(tokens)))
    hasher.update(ticket)
    for each in tokens:
        token, reason = each.token, finish_reason_to_pb(each.finish_reason)
        has_logprob = token.logprob is not None
        fields = (
            each.sequence,
            each.index,
            token.token_id,
            reason,
            has_logprob,
            token.logprob or 0.0,
            len(token.top_logprobs),
        )
        hasher.update(_TOKEN_FRAME.pack(*fields))
        for top in token.top_logprobs:
            hasher.update(_ALTERNATIVE_FRAME.pack(top.token_id, top.logprob))
    return hasher.digest()


class ChunkMessage:
    """A serialized PushRequest with a chunk, into which the payload is written in place.

    Protobuf would copy the payload three times, each time into memory that is in no cache.
    """

    def __init__(self, span: KVSpan, num_bytes: int) -> None:
        fields = _chunk_message(span, bytes(DIGEST_BYTES)).SerializeToString()
        payload_head = _field_head(_PAYLOAD_TAG, num_bytes)
        head = _field_head(_CHUNK_TAG, len(fields) + len(payload_head) + num_bytes) + fields + payload_head
        # digest has the highest number: it is the last of the fields
        self._digest_end = len(head) - len(payload_head)
        self._message: bytes = _new_bytes(None, len(head) + num_bytes)
        # No other code has seen these bytes yet, so writing into them is safe, as in C.
        memory = (ctypes.c_ubyte * len(self._message)).from_address(_address_of(self._message))
        self._view = memoryview(memory).cast("B")
        self._view[: len(head)] = head
        self.payload = self._view[len(head) :]  # filled before `finish`

    def finish(self, digest: bytes) -> bytes:
        """The payload must not change afterwards."""
        self._view[self._digest_end - DIGEST_BYTES : self._digest_end] = digest
        return self._message


def encode_chunk(chunk: Chunk) -> bytes:
    payload = memoryview(chunk.payload).cast("B")
    fields = _chunk_message(chunk.span, chunk.digest).SerializeToString()
    payload_head = _field_head(_PAYLOAD_TAG, payload.nbytes)
    num_chunk_bytes = len(fields) + len(payload_head) + payload.nbytes
    return b"".join((_field_head(_CHUNK_TAG, num_chunk_bytes), fields, payload_head, payload))


def encode_shared_chunk(chunk: SharedChunk) -> bytes:
    message = _chunk_message(chunk.span, chunk.digest)
    message.shared.offset, message.shared.num_bytes = chunk.where.offset, chunk.where.num_bytes
    return kv_transfer_pb2.PushRequest(chunk=message).SerializeToString()


def decode_request(message: bytes) -> kv_transfer_pb2.PushRequest | Chunk | SharedChunk:
    """Decodes an untrusted message. A chunk's payload is a view of it.

    Raises:
        TransferError: the bytes are not a message.
    """
    try:
        if (parts := _split_chunk(message)) is not None:
            return _chunk_of(kv_transfer_pb2.KVChunk.FromString(parts[0]), parts[1])
        request = kv_transfer_pb2.PushRequest.FromString(message)
    except (DecodeError, ValueError) as error:
        raise TransferError("a message of the push cannot be read") from error
    return _chunk_of(request.chunk, request.chunk.payload) if request.WhichOneof("message") == "chunk" else request


def _chunk_of(fields: kv_transfer_pb2.KVChunk, payload: Buffer) -> Chunk | SharedChunk:
    span = KVSpan(fields.layer_begin, fields.layer_end, fields.token_begin, fields.token_end)
    if fields.HasField("shared"):
        return SharedChunk(span, SharedSlice(fields.shared.offset, fields.shared.num_bytes), fields.digest)
    return Chunk(span, payload, fields.digest)


def _chunk_message(span: KVSpan, digest: bytes) -> kv_transfer_pb2.KVChunk:
    return kv_transfer_pb2.KVChunk(
        layer_begin=span.layer_begin,
        layer_end=span.layer_end,
        token_begin=span.token_begin,
        token_end=span.token_end,
        digest=digest,
    )


def _split_chunk(message: bytes) -> tuple[bytes, memoryview] | None:
    """The chunk's other fields and its payload, unless the payload does not end the message.

    | chunk tag | length | other fields | payload tag | length | payload |
    """
    if not message or message[0] != _CHUNK_TAG:
        return None
    length, fields_begin = _read_varint(message, 1)
    if fields_begin + length != len(message):
        return None
    field_begin = fields_begin
    while field_begin < len(message):
        tag, position = _read_varint(message, field_begin)
        value, position = _read_varint(message, position)
        if tag == _PAYLOAD_TAG and position + value == len(message):
            return message[fields_begin:field_begin], memoryview(message)[position:]
        if tag == _PAYLOAD_TAG or tag & 7 not in (0, _LENGTH_DELIMITED):
            return None
        field_begin = position + value if tag & 7 == _LENGTH_DELIMITED else position
    return None


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """The number, and where it ends."""
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number has no end")


def _field_head(tag: int, num_bytes: int) -> bytes:
    return _varint(tag) + _varint(num_bytes)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
