"""Chunks on the wire: what is encoded by hand is what protobuf reads, and nothing of a chunk can
change unnoticed.
"""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import TransferError
from kvrelay.kv_transfer.codec import (
    Chunk,
    ChunkMessage,
    SharedChunk,
    SharedSlice,
    chunk_digest,
    decode_request,
    encode_chunk,
    encode_shared_chunk,
)
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.v1 import kv_transfer_pb2

TICKET = bytes(range(16))
SPAN = KVSpan(1, 3, 16, 32)
PAYLOAD = bytes(range(256))

numbers = st.integers(0, 2**32 - 1)


@given(numbers, numbers, numbers, numbers, st.binary(max_size=70_000))
def test_protobuf_reads_what_the_codec_writes(a: int, b: int, c: int, d: int, payload: bytes) -> None:
    chunk = Chunk(KVSpan(a, b, c, d), payload, chunk_digest(TICKET, 1, KVSpan(a, b, c, d), payload))
    request = kv_transfer_pb2.PushRequest.FromString(encode_chunk(chunk))
    assert request.WhichOneof("message") == "chunk"
    fields = request.chunk
    assert (fields.layer_begin, fields.layer_end, fields.token_begin, fields.token_end) == (a, b, c, d)
    assert (fields.payload, fields.digest, fields.HasField("shared")) == (payload, chunk.digest, False)


@given(numbers, numbers, numbers, numbers, st.binary(min_size=1, max_size=70_000))
def test_a_message_that_is_written_in_place_is_the_one_that_is_encoded(
    a: int, b: int, c: int, d: int, payload: bytes
) -> None:
    message = ChunkMessage(KVSpan(a, b, c, d), len(payload))
    message.payload[:] = payload
    assert message.finish(TICKET) == encode_chunk(Chunk(KVSpan(a, b, c, d), payload, TICKET))


@given(numbers, numbers, numbers, numbers, st.binary(max_size=70_000), st.booleans())
def test_the_codec_reads_what_protobuf_and_itself_write(
    a: int, b: int, c: int, d: int, payload: bytes, by_hand: bool
) -> None:
    chunk = Chunk(KVSpan(a, b, c, d), payload, TICKET)
    fields = kv_transfer_pb2.KVChunk(
        layer_begin=a, layer_end=b, token_begin=c, token_end=d, payload=payload, digest=TICKET
    )  # with its payload in the middle
    message = encode_chunk(chunk) if by_hand else kv_transfer_pb2.PushRequest(chunk=fields).SerializeToString()
    assert decode_request(message) == chunk


@given(numbers, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_chunk_in_shared_memory_is_read_as_it_was_written(a: int, offset: int, num_bytes: int) -> None:
    chunk = SharedChunk(KVSpan(a, 2, 3, 4), SharedSlice(offset, num_bytes), TICKET)
    assert decode_request(encode_shared_chunk(chunk)) == chunk


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 60))
def test_bytes_that_are_no_message_are_refused_or_read_as_protobuf_would(noise: bytes, begin: int, length: int) -> None:
    message = bytearray(encode_chunk(Chunk(SPAN, PAYLOAD[:16], TICKET)))
    message[begin : begin + length] = noise
    try:
        read = decode_request(bytes(message))
    except TransferError:
        return
    if isinstance(read, Chunk):
        assert len(read.payload) <= len(message)


@pytest.mark.parametrize(
    "message", [b"\x12", b"\x12\xff", b"\x12\x02\x2a\x09", b"\xff" * 12, b"\x12\x0c" + b"\xff" * 12]
)
def test_a_message_that_is_cut_is_refused(message: bytes) -> None:
    with pytest.raises(TransferError, match="cannot be read"):
        decode_request(message)


def test_the_payload_of_a_chunk_is_not_copied() -> None:
    message = encode_chunk(Chunk(SPAN, PAYLOAD, TICKET))
    read = decode_request(message)
    assert isinstance(read, Chunk)
    assert isinstance(read.payload, memoryview)
    assert read.payload.obj is message


def test_a_memoryview_of_any_shape_is_encoded_as_its_bytes() -> None:
    view = memoryview(PAYLOAD).cast("B", shape=[16, 16])
    flat = memoryview(PAYLOAD)
    assert (
        encode_chunk(Chunk(SPAN, flat, b""))
        == encode_chunk(Chunk(SPAN, PAYLOAD, b""))
        == encode_chunk(Chunk(SPAN, view, b""))
    )


@pytest.mark.parametrize("field", ["layer_begin", "layer_end", "token_begin", "token_end"])
def test_the_digest_depends_on_every_bound(field: str) -> None:
    changed = dataclasses.replace(SPAN, **{field: getattr(SPAN, field) + 1})
    assert chunk_digest(TICKET, 1, changed, PAYLOAD) != chunk_digest(TICKET, 1, SPAN, PAYLOAD)


def test_the_digest_depends_on_ticket_and_attempt() -> None:
    digest = chunk_digest(TICKET, 1, SPAN, PAYLOAD)
    assert len(digest) == 16
    assert chunk_digest(TICKET, 2, SPAN, PAYLOAD) != digest
    assert chunk_digest(TICKET[:-1] + b"x", 1, SPAN, PAYLOAD) != digest


@given(st.integers(0, len(PAYLOAD) * 8 - 1))
def test_the_digest_depends_on_every_bit_of_the_payload(bit: int) -> None:
    changed = bytearray(PAYLOAD)
    changed[bit // 8] ^= 1 << bit % 8
    assert chunk_digest(TICKET, 1, SPAN, changed) != chunk_digest(TICKET, 1, SPAN, PAYLOAD)


def test_bytes_cannot_move_between_ticket_and_payload() -> None:
    assert chunk_digest(TICKET, 1, SPAN, PAYLOAD) != chunk_digest(TICKET + PAYLOAD[:1], 1, SPAN, PAYLOAD[1:])
