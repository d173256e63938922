"""KV chunks as bytes on the wire: their digest, and their encoding with a single copy of the payload.

Knows nothing of tensors: a payload is a buffer.
"""

import struct
from dataclasses import dataclass

import xxhash

from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.v1 import kv_transfer_pb2

TICKET_BYTES = 16
DIGEST_BYTES = 16

Buffer = bytes | bytearray | memoryview

# ticket length, attempt, layers, tokens, payload length: fixed widths, so that no two different chunks give the same bytes.
_FRAME = struct.Struct("<QQQQQQQ")
_LENGTH_DELIMITED = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a KV cache as it travels: [layers, 2, tokens, kv_heads, head_dim], with its digest."""

    span: KVSpan
    payload: Buffer
    digest: bytes


def chunk_digest(ticket: bytes, attempt: int, span: KVSpan, payload: Buffer) -> bytes:
    """xxh3-128 over ticket, attempt, layer range, token range and payload: 16 bytes, big endian."""
    hasher = xxhash.xxh3_128()
    hasher.update(
        _FRAME.pack(
            len(ticket), attempt, span.layer_begin, span.layer_end, span.token_begin, span.token_end, memoryview(payload).nbytes
        )
    )
    hasher.update(ticket)
    hasher.update(payload)
    return hasher.digest()


def encode_chunk(chunk: Chunk) -> bytes:
    """A serialized PushRequest that holds the chunk.

    Written by hand around the payload, because building the message would copy the payload three times; this copies it once.
    """
    payload = memoryview(chunk.payload).cast("B")
    fields = kv_transfer_pb2.KVChunk(
        layer_begin=chunk.span.layer_begin,
        layer_end=chunk.span.layer_end,
        token_begin=chunk.span.token_begin,
        token_end=chunk.span.token_end,
        digest=chunk.digest,
    ).SerializeToString()
    payload_head = _field_head(kv_transfer_pb2.KVChunk.PAYLOAD_FIELD_NUMBER, payload.nbytes)
    num_chunk_bytes = len(fields) + len(payload_head) + payload.nbytes
    chunk_head = _field_head(kv_transfer_pb2.PushRequest.CHUNK_FIELD_NUMBER, num_chunk_bytes)
    return b"".join((chunk_head, fields, payload_head, payload))


def decode_chunk(message: kv_transfer_pb2.KVChunk) -> Chunk:
    """The chunk as its sender describes it; nothing of it is to be trusted."""
    span = KVSpan(message.layer_begin, message.layer_end, message.token_begin, message.token_end)
    return Chunk(span, message.payload, message.digest)


def _field_head(number: int, num_bytes: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(num_bytes)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
