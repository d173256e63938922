"""Chunks on the wire: what is encoded by hand is what protobuf reads, and nothing of a chunk can change unnoticed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_transfer.codec import Chunk, chunk_digest, decode_chunk, encode_chunk
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
    assert decode_chunk(request.chunk) == chunk


def test_a_memoryview_of_any_shape_is_encoded_as_its_bytes() -> None:
    view = memoryview(PAYLOAD).cast("B", shape=[16, 16])
    flat = memoryview(PAYLOAD)
    assert encode_chunk(Chunk(SPAN, flat, b"")) == encode_chunk(Chunk(SPAN, PAYLOAD, b"")) == encode_chunk(Chunk(SPAN, view, b""))


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
