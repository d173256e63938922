"""Changes of bytes and of messages, drawn from a seeded generator: what a faulty wire, a faulty
peer or an attacker would send.

Knows nothing of what the bytes mean.
"""

import math
import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Generator = random.Random

VARINTS = (b"\x00", b"\x7f", b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 11)
"""Numbers at the ends of their ranges, and two that are none."""
INTEGERS = (0, 1, 2, 7, 255, 4096, 2**31 - 1, 2**31, 2**32 - 1)
LARGE_INTEGERS = (*INTEGERS, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan)
TEXTS = (
    "",
    "a",
    "\0",
    "../../etc/passwd",
    "{}",
    "x" * 200,
    "é\U0001f600",
    "\u202e",
    "' OR 1=1 --",
    "%s%n",
    "unix:/tmp/x",
)
MAX_REPEATS = 100_000


def mutate_bytes(data: bytes, other: bytes, generator: Generator) -> bytes:
    """Other bytes, one to three changes away.

    Args:
        data: what is changed.
        other: what a splice takes its end from.
        generator: decides.
    """
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        data = generator.choice(_BYTE_CHANGES)(data, other, generator)
    return data


def _flip(data: bytes, other: bytes, generator: Generator) -> bytes:
    if not data:
        return b"\x01"
    changed = bytearray(data)
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, other: bytes, generator: Generator) -> bytes:
    return data[: generator.randrange(len(data) + 1)]


def _extend(data: bytes, other: bytes, generator: Generator) -> bytes:
    return data + generator.choice((generator.randbytes(generator.randint(1, 40)), bytes(8), data, other))


def _splice(data: bytes, other: bytes, generator: Generator) -> bytes:
    return data[: generator.randrange(len(data) + 1)] + other[generator.randrange(len(other) + 1) :]


def _overwrite(data: bytes, other: bytes, generator: Generator) -> bytes:
    begin = generator.randrange(len(data) + 1)
    return data[:begin] + generator.choice((*VARINTS, generator.randbytes(4))) + data[begin + generator.randint(0, 4) :]


def _cut_out(data: bytes, other: bytes, generator: Generator) -> bytes:
    begin = generator.randrange(len(data) + 1)
    return data[:begin] + data[begin + generator.randint(1, 16) :]


_BYTE_CHANGES: tuple[Callable[[bytes, bytes, Generator], bytes], ...] = (
    _flip,
    _truncate,
    _extend,
    _splice,
    _overwrite,
    _cut_out,
)


def mutate_message(message: Message, generator: Generator) -> None:
    """Sets one to three fields, perhaps within a part of the message, to values that nobody would
    choose.
    """
    for _ in range(generator.choice((1, 1, 2, 3))):
        _mutate_field(message, generator.choice(_fields(message)), generator)


def _fields(message: Message) -> list[Any]:
    return list(message.DESCRIPTOR.fields)


def _mutate_field(message: Message, field: FieldDescriptor, generator: Generator) -> None:
    if generator.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        _fill_map(getattr(message, field.name), generator)
    elif field.is_repeated:
        _mutate_repeated(message, field, generator)
    elif field.message_type is not None:
        part = getattr(message, field.name)
        part.SetInParent()
        if field.message_type.fields:
            mutate_message(part, generator)
    else:
        setattr(message, field.name, draw_value(field, generator))


def _fill_map(entries: Any, generator: Generator) -> None:
    """All maps of the protocol have numbers as keys and floats as values."""
    for key in generator.sample(range(100_000), generator.choice((1, 3, 1024, 1025))):
        entries[key] = generator.choice(FLOATS)


def _mutate_repeated(message: Message, field: FieldDescriptor, generator: Generator) -> None:
    values = getattr(message, field.name)
    # Rarely, for it takes long to make and to read.
    count = MAX_REPEATS if generator.random() < 0.002 else generator.choice((1, 2, 3, 17, 65, 1025))
    if field.message_type is None:
        values.extend([draw_value(field, generator)] * count)
        return
    part = values.add() if not values or generator.random() < 0.5 else values[generator.randrange(len(values))]
    if field.message_type.fields:
        mutate_message(part, generator)
    values.extend([part] * (count - 1))


def draw_value(field: FieldDescriptor, generator: Generator) -> Any:
    """An odd value that the field's type can hold."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return generator.choice((b"", b"\xff\xfe", bytes(16), generator.randbytes(16), generator.randbytes(300)))
        case FieldDescriptor.CPPTYPE_STRING:
            return generator.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return generator.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return generator.random() < 0.5
        case FieldDescriptor.CPPTYPE_ENUM:
            return generator.choice((0, 1, 2, 99, -1, 2**31 - 1))
        case FieldDescriptor.CPPTYPE_UINT64:
            return generator.choice(LARGE_INTEGERS)
        case FieldDescriptor.CPPTYPE_INT32:
            return generator.choice((-(2**31), -1, 0, 1, 2**31 - 1))
        case FieldDescriptor.CPPTYPE_INT64:
            return generator.choice((-(2**63), -1, 0, 1, 2**63 - 1))
        case _:
            return generator.choice(INTEGERS)
