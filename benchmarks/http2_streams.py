"""Reads many server-streaming gRPC calls over one HTTP/2 connection for next to nothing: it notes
when bytes came, and what they say is found out when all is over. Knows gRPC's framing and no
message.

For load generators that share a machine with what they measure: a client library takes as much for
a message as a server does. RFC 9113 has the frames; the whole output fits the windows that are
granted at the beginning, so that none is ever updated.
"""

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.config.settings import DEFAULT_GATEWAY_PORT
from kvrelay.network.host_port import split_host_port

READ_BYTES = 1 << 18
MAX_WINDOW_BYTES = 2**31 - 1
DEFAULT_WINDOW_BYTES = 65_535
MAX_FRAME_BYTES = 2**24 - 1

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER_BYTES = 9
_MESSAGE_HEADER_BYTES = 5
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 4, 5

Message = tuple[float, bytes]
"""When it was complete, in monotonic seconds, and the message's bytes."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a connection is encrypted, and who calls."""

    ca_file: str
    api_key: str


class BrokenConnectionError(Exception):
    """The server closed the connection or reset a stream."""


def read_streams(
    address: str, method: str, requests: Sequence[bytes], timeout_s: float, access: Access | None = None
) -> list[list[Message]]:
    """Opens a call for each request, all at once, and reads them to their ends.

    Args:
        address: host:port.
        method: path of a method that takes one message and answers with a stream.
        requests: serialized.
        timeout_s: most time between two reads, and each call's deadline.
        access: None speaks plain text and says nothing of the caller.

    Returns:
        The messages of each call. Statuses are not read: whether a call ended well is for its last
        message to tell.

    Raises:
        BrokenConnectionError: the server closed the connection or reset a stream.
        TimeoutError: nothing came for so long.
    """
    with _connect(address, timeout_s, access) as connection:
        connection.sendall(_opening(address, method, requests, timeout_s, access))
        chunks = _read_to_the_end(connection, len(requests))
    return [_messages(chunks[1 + 2 * number]) for number in range(len(requests))]


def _connect(address: str, timeout_s: float, access: Access | None) -> socket.socket:
    host, port = split_host_port(address)
    connection = socket.create_connection((host, port or DEFAULT_GATEWAY_PORT), timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if access is None:
        return connection
    context = ssl.create_default_context(cafile=access.ca_file)
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(connection, server_hostname=host)


def _read_to_the_end(connection: socket.socket, num_streams: int) -> dict[int, list[Message]]:
    """Payloads of the DATA frames of each stream. Streams have odd numbers, from 1."""
    chunks: dict[int, list[Message]] = {1 + 2 * number: [] for number in range(num_streams)}
    num_open = num_streams
    unread = b""
    while num_open:
        received = connection.recv(READ_BYTES)
        if not received:
            raise BrokenConnectionError("the server closed the connection")
        now = time.monotonic()
        unread += received
        begin, length = 0, len(unread)
        while length - begin >= _FRAME_HEADER_BYTES:
            size_high, size_low, kind, flags, stream = struct.unpack_from(">BHBBI", unread, begin)
            payload_begin = begin + _FRAME_HEADER_BYTES
            end = payload_begin + (size_high << 16) + size_low
            if end > length:
                break
            if kind == _DATA:
                chunks[stream].append((now, unread[payload_begin:end]))
            elif kind in (_SETTINGS, _PING, _RST_STREAM, _GOAWAY):
                _answer(connection, kind, flags, unread[payload_begin:end])
            if flags & _END_STREAM and kind in (_DATA, _HEADERS):
                num_open -= 1
            begin = end
        unread = unread[begin:]
    return chunks


def _answer(connection: socket.socket, kind: int, flags: int, payload: bytes) -> None:
    if kind in (_RST_STREAM, _GOAWAY):
        raise BrokenConnectionError(
            f"the server ended {'a stream' if kind == _RST_STREAM else 'the connection'}: {payload!r}"
        )
    if not flags & _ACK:
        connection.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))


def _messages(chunks: Sequence[Message]) -> list[Message]:
    """gRPC's messages of a stream: a frame may have several of them, or a part of one."""
    messages = []
    unread = b""
    for time_s, chunk in chunks:
        unread += chunk
        while len(unread) >= _MESSAGE_HEADER_BYTES:
            end = _MESSAGE_HEADER_BYTES + int.from_bytes(unread[1:_MESSAGE_HEADER_BYTES], "big")
            if len(unread) < end:
                break
            messages.append((time_s, unread[_MESSAGE_HEADER_BYTES:end]))
            unread = unread[end:]
    return messages


def _opening(address: str, method: str, requests: Sequence[bytes], timeout_s: float, access: Access | None) -> bytes:
    """All that is sent before the first answer."""
    settings = ((_HEADER_TABLE_SIZE, 0), (_INITIAL_WINDOW_SIZE, MAX_WINDOW_BYTES), (_MAX_FRAME_SIZE, MAX_FRAME_BYTES))
    parts = [
        _PREFACE,
        _frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HI", *setting) for setting in settings)),
        _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES)),
    ]
    fields = {
        ":method": "POST",
        ":scheme": "http" if access is None else "https",
        ":path": method,
        ":authority": address,
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": f"{int(timeout_s)}S",
    }
    if access is not None:
        fields["authorization"] = f"Bearer {access.api_key}"
    headers = b"".join(_header_field(name, value) for name, value in fields.items())
    for number, request in enumerate(requests):
        stream = 1 + 2 * number
        message = b"\0" + struct.pack(">I", len(request)) + request
        parts += [_frame(_HEADERS, _END_HEADERS, stream, headers), _frame(_DATA, _END_STREAM, stream, message)]
    return b"".join(parts)


def _header_field(name: str, value: str) -> bytes:
    """A literal field that is not indexed (RFC 7541, 6.2.2), of lengths below 127."""
    assert max(len(name), len(value)) < 127, "one byte holds each length"
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">BHBBI", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload
