"""Pushes that must be refused, made from pushes that are accepted: each with the errors that are
right for it.

by bytes        one message with flipped, cut, added, overwritten or foreign bytes
by meaning      well-formed messages, some even with a right digest, that say what they must not
by order        messages left out, repeated, or in the wrong place; messages of another push
by memory       payloads in shared memory that are elsewhere, changed, or not there
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvrelay.core.job import FinishReason, JobId, SequenceToken, Token
from kvrelay.errors import FingerprintError, KvrelayError, TicketError, TransferError
from kvrelay.kv_transfer.codec import (
    Chunk,
    SharedChunk,
    SharedSlice,
    chunk_digest,
    decode_request,
    encode_chunk,
    encode_shared_chunk,
    end_digest,
)
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.v1 import kv_transfer_pb2 as pb
from kvrelay.wire.convert import sequence_token_from_pb, sequence_token_to_pb
from tests.fuzz.kv_pushes import LAYOUT, MODEL, NUM_TOKENS, CapturedPush
from tests.fuzz.mutations import INTEGERS, LARGE_INTEGERS, mutate_bytes

Messages = tuple[bytes, ...]
Errors = tuple[type[KvrelayError], ...]
ANY_ERROR: Errors = (TransferError, TicketError, FingerprintError)
REGION_NAMES = (b"", b"short", bytes(16), b"../../dev/shm/x", b"/proc/self/mem\0\0", b"kvrelay-0123456", b"x" * 4096)


@dataclass(frozen=True)
class BadPush:
    """What is sent, and how it must be refused."""

    kind: str
    messages: Messages
    errors: Errors = (TransferError,)
    damage: tuple[int, int] | None = None
    """Which byte of the push's shared memory is changed while it is sent, and by which bits."""


def draw_bad_push(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    """One push that must be refused.

    Args:
        push: is accepted as it is.
        other: into another reservation, with other KV.
        stale: into the same reservation, with the ticket of an attempt that has ended.
        generator: decides.
    """
    while True:
        kind, change = generator.choice(_BYTES if generator.random() < 0.5 else _OTHERS)
        bad = change(push, other, stale, generator)
        if bad is not None and (bad.damage is not None or meaning(bad.messages) != meaning(push.messages)):
            return replace(bad, kind=kind)


def meaning(messages: Messages) -> list[object]:
    """What the messages say, read with protobuf alone; bytes that are no message, or more than is
    known, say what they are.
    """
    return [_meaning(message) for message in messages]


def _meaning(message: bytes) -> object:
    try:
        request = pb.PushRequest.FromString(message)
    except ValueError:
        return message
    except Exception as error:  # protobuf's own, which is no ValueError
        return (type(error).__name__, message)
    match request.WhichOneof("message"):
        case "header":
            header = pb.PushHeader.FromString(request.header.SerializeToString())
            header.DiscardUnknownFields()
            return header.SerializeToString(deterministic=True)
        case "chunk":
            chunk = request.chunk
            where = (chunk.shared.offset, chunk.shared.num_bytes) if chunk.HasField("shared") else None
            payload = chunk.payload if where is None else b""
            return (
                chunk.layer_begin,
                chunk.layer_end,
                chunk.token_begin,
                chunk.token_end,
                payload,
                chunk.digest,
                where,
            )
        case "end":
            return (request.end.num_chunks, tuple(map(sequence_token_from_pb, request.end.tokens)), request.end.digest)
    return None


Change = Callable[[CapturedPush, CapturedPush, CapturedPush, random.Random], BadPush | None]


def _put(push: CapturedPush, position: int, *messages: bytes) -> Messages:
    """The push with other messages in the place of one."""
    return (*push.messages[:position], *messages, *push.messages[position + 1 :])


def _request(push: CapturedPush, position: int) -> pb.PushRequest:
    return pb.PushRequest.FromString(push.messages[position])


def _a_chunk(push: CapturedPush, generator: random.Random) -> tuple[int, Chunk | SharedChunk]:
    position = generator.randrange(1, len(push.messages) - 1)
    chunk = decode_request(push.messages[position])
    assert isinstance(chunk, Chunk | SharedChunk)
    return position, chunk


def _encode(chunk: Chunk | SharedChunk) -> bytes:
    return encode_chunk(chunk) if isinstance(chunk, Chunk) else encode_shared_chunk(chunk)


def _payload(push: CapturedPush, span: KVSpan) -> bytes:
    num_bytes = len(push.kv) // LAYOUT.num_layers
    return push.kv[span.layer_begin * num_bytes : span.layer_end * num_bytes]


# --- by bytes -------------------------------------------------------------------------------------


def _bytes_of(which: str) -> Change:
    def change(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
        last = len(push.messages) - 1
        position = {"header": 0, "chunk": generator.randrange(1, last), "end": last}[which]
        donor = generator.choice((push, other)).messages
        changed = mutate_bytes(push.messages[position], generator.choice(donor), generator)
        return BadPush("", _put(push, position, changed), ANY_ERROR)

    return change


def _noise(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    position = generator.randrange(len(push.messages))
    return BadPush("", _put(push, position, generator.randbytes(generator.choice((0, 1, 2, 40, 1000)))), ANY_ERROR)


# --- by meaning -----------------------------------------------------------------------------------


def _header(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    request = _request(push, 0)
    header = request.header
    match generator.randrange(6):
        case 0:
            header.fingerprint = generator.choice(("", "other", MODEL.fingerprint + "0", MODEL.fingerprint[:-1]))
            errors: Errors = (FingerprintError,)
        case 1:
            header.wire_version = generator.choice((0, 2, 2**32 - 1))
            errors = (FingerprintError,)
        case 2:
            header.ticket = generator.choice(
                (b"", bytes(16), header.ticket[:-1], header.ticket + b"\0", b"x" * 100_000)
            )
            errors = (TicketError,)
        case 3:
            header.job_id.attempt = generator.choice([each for each in INTEGERS if each != header.job_id.attempt])
            errors = (TicketError,)
        case 4:
            header.job_id.first_sequence = generator.choice((1, 2**32 - 1))
            errors = (TicketError,)
        case _:
            ranges = ((1, NUM_TOKENS), (0, NUM_TOKENS + 1), (0, 0), (0, 2**32 - 1))
            header.token_begin, header.token_end = generator.choice(ranges)
            errors = (TransferError,)
    return BadPush("", _put(push, 0, request.SerializeToString()), errors)


def _range_out_of_the_reservation(
    push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random
) -> BadPush | None:
    """With a digest that is right, as only the owner of the ticket can make it."""
    position, chunk = _a_chunk(push, generator)
    layers, tokens = LAYOUT.num_layers, NUM_TOKENS
    span = generator.choice(
        (
            KVSpan(layers, layers + 1, 0, tokens),
            KVSpan(2**32 - 2, 2**32 - 1, 0, tokens),
            KVSpan(0, 1, 1, tokens + 1),
            KVSpan(0, 1, tokens, 2 * tokens),
            KVSpan(0, 1, 2**32 - 1 - tokens, 2**32 - 1),
            KVSpan(1, 0, 0, tokens),
            KVSpan(0, 0, 0, tokens),
            KVSpan(0, 1, 5, 5),
            KVSpan(0, 2**32 - 1, 0, 2**32 - 1),
        )
    )
    return BadPush("", _put(push, position, _encode(_sealed(push, replace(chunk, span=span)))))


def _range_of_another_chunk(
    push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random
) -> BadPush:
    """With the digest that it had."""
    position, chunk = _a_chunk(push, generator)
    layer = (chunk.span.layer_begin + 1) % LAYOUT.num_layers
    return BadPush("", _put(push, position, _encode(replace(chunk, span=KVSpan(layer, layer + 1, 0, NUM_TOKENS)))))


def _size(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    position, chunk = _a_chunk(push, generator)
    payload = generator.choice((b"", _payload(push, chunk.span)[:-1], _payload(push, chunk.span) + b"\0", push.kv))
    return BadPush("", _put(push, position, encode_chunk(_seal(push, Chunk(chunk.span, payload, b"")))))


def _digest(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    position, chunk = _a_chunk(push, generator)
    payload, attempt = _payload(push, chunk.span), push.reservation.job.job_id.attempt
    ticket = push.reservation.ticket
    digest = generator.choice(
        (
            b"",
            chunk.digest[:-1],
            chunk.digest + b"\0",
            chunk_digest(ticket, attempt, chunk.span, _payload(other, chunk.span)),
            chunk_digest(ticket, attempt + 1, chunk.span, payload),
            chunk_digest(stale.reservation.ticket, attempt, chunk.span, payload),
            chunk_digest(other.reservation.ticket, attempt, chunk.span, payload),
        )
    )
    return BadPush("", _put(push, position, _encode(replace(chunk, digest=digest))))


def _end(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    """Half of them with a digest that is right."""
    reservation, position = push.reservation, len(push.messages) - 1
    end = _request(push, position).end
    tokens, num_chunks = [sequence_token_from_pb(token) for token in end.tokens], end.num_chunks
    has_right_digest = generator.random() < 0.5
    changed: list[list[SequenceToken]] = [
        [],
        tokens * 2,
        tokens * 1000,
        [replace(tokens[0], index=1)],
        [replace(tokens[0], sequence=1)],
        [replace(tokens[0], job_id=JobId("f" * 32, 1))],
        [replace(tokens[0], token=Token(generator.choice((MODEL.vocab_size, 2**32 - 1))))],
    ]
    if not has_right_digest:  # by itself this is nothing that a sender may not say
        changed += [[replace(tokens[0], token=Token((tokens[0].token.token_id + 1) % MODEL.vocab_size))]]
        changed += [
            [replace(tokens[0], finish_reason=FinishReason.STOP)],
            [replace(tokens[0], token=Token(1, logprob=-1.0))],
        ]
    if generator.random() < 0.3:
        num_chunks = generator.choice([each for each in INTEGERS if each != num_chunks])
    else:
        tokens = generator.choice(changed)
    digest = end.digest
    if has_right_digest:
        digest = end_digest(reservation.ticket, reservation.job.job_id.attempt, num_chunks, tokens)
    message = pb.PushEnd(num_chunks=num_chunks, tokens=map(sequence_token_to_pb, tokens), digest=digest)
    return BadPush("", _put(push, position, pb.PushRequest(end=message).SerializeToString()))


def _sealed(push: CapturedPush, chunk: Chunk | SharedChunk) -> Chunk | SharedChunk:
    if isinstance(chunk, Chunk):
        return _seal(push, chunk)
    reservation = push.reservation
    payload = _payload(push, chunk.span)
    return replace(chunk, digest=chunk_digest(reservation.ticket, reservation.job.job_id.attempt, chunk.span, payload))


def _seal(push: CapturedPush, chunk: Chunk) -> Chunk:
    reservation = push.reservation
    digest = chunk_digest(reservation.ticket, reservation.job.job_id.attempt, chunk.span, chunk.payload)
    return replace(chunk, digest=digest)


# --- by order -------------------------------------------------------------------------------------


def _left_out(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    position = generator.randrange(len(push.messages))
    return BadPush("", _put(push, position))


def _repeated(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    """A chunk or the header once more: behind the end nobody reads any more."""
    position = generator.randrange(len(push.messages) - 1)
    insert = generator.randrange(position + 1, len(push.messages))
    return BadPush("", (*push.messages[:insert], push.messages[position], *push.messages[insert:]))


def _header_not_first(
    push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random
) -> BadPush:
    header, *rest = push.messages
    insert = generator.randrange(1, len(rest) + 1)
    return BadPush("", (*rest[:insert], header, *rest[insert:]))


def _foreign_chunk(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    position = generator.randrange(1, len(push.messages) - 1)
    return BadPush("", _put(push, position, generator.choice((other, stale)).messages[position]))


def _foreign_end(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    return BadPush("", _put(push, len(push.messages) - 1, generator.choice((other, stale)).messages[-1]))


def _foreign_ticket(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    request = _request(push, 0)
    request.header.ticket = other.reservation.ticket
    return BadPush("", _put(push, 0, request.SerializeToString()), (TicketError,))


def _stale(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    """All of an older attempt, as it was accepted once."""
    return BadPush("", stale.messages, (TicketError,))


# --- by memory ------------------------------------------------------------------------------------


def _slice(push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random) -> BadPush:
    """Elsewhere in the region, beyond its end, or in no region at all."""
    position, chunk = _a_chunk(push, generator)
    size = len(_payload(push, chunk.span))
    offset = generator.choice((*LARGE_INTEGERS, 1, size - 1))
    where = SharedSlice(offset, generator.choice((size, size, size - 1, *LARGE_INTEGERS)))
    return BadPush("", _put(push, position, encode_shared_chunk(SharedChunk(chunk.span, where, chunk.digest))))


def _region_name(
    push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random
) -> BadPush | None:
    names = list(REGION_NAMES)
    # a push that has its payloads in its messages would not look
    if push.region is not None and other.region is not None:
        names.append(other.region.region_id)
    request = _request(push, 0)
    request.header.shared_region = generator.choice(names)
    return BadPush("", _put(push, 0, request.SerializeToString()))


def _damaged_memory(
    push: CapturedPush, other: CapturedPush, stale: CapturedPush, generator: random.Random
) -> BadPush | None:
    if push.region is None:
        return None
    return BadPush("", push.messages, damage=(generator.randrange(push.region.num_bytes), 1 << generator.randrange(8)))


_BYTES: tuple[tuple[str, Change], ...] = (
    ("bytes of the header", _bytes_of("header")),
    ("bytes of a chunk", _bytes_of("chunk")),
    ("bytes of the end", _bytes_of("end")),
    ("noise", _noise),
)
_OTHERS: tuple[tuple[str, Change], ...] = (
    ("header", _header),
    ("range out of the reservation", _range_out_of_the_reservation),
    ("range of another chunk", _range_of_another_chunk),
    ("size", _size),
    ("digest", _digest),
    ("end", _end),
    ("left out", _left_out),
    ("repeated", _repeated),
    ("header not first", _header_not_first),
    ("foreign chunk", _foreign_chunk),
    ("foreign end", _foreign_end),
    ("foreign ticket", _foreign_ticket),
    ("stale", _stale),
    ("slice", _slice),
    ("region name", _region_name),
    ("damaged memory", _damaged_memory),
)
KINDS = frozenset(kind for kind, _ in _BYTES + _OTHERS)
