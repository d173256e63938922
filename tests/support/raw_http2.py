"""HTTP/2 frames by hand, for peers that no library would be.

python -m tests.support.raw_http2 PORT PATH NUM    begins NUM calls and resets each at once
"""

import select
import socket
import struct
import sys

HOST = "127.0.0.1"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_HEADERS = 4
CANCEL = 8
CALLS_PER_CONNECTION = 20_000


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header of less than 127 bytes each, without indexing."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def headers_of(path: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(literal(name.encode(), value.encode()) for name, value in fields.items())


def connect(port: int) -> socket.socket:
    connection = socket.create_connection((HOST, port), 30)
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connection


def pump(connection: socket.socket, data: bytes, timeout_s: float = 30.0) -> int:
    """Writes what the peer takes, and drops what it answers; returns the bytes written."""
    connection.setblocking(False)
    sent, view = 0, memoryview(data)
    while sent < len(data):
        readable, writable, _ = select.select([connection], [connection], [], timeout_s)
        try:
            if not (readable or writable) or (readable and not connection.recv(1 << 16)):
                break
            if writable:
                sent += connection.send(view[sent : sent + (1 << 16)])
        except BlockingIOError:
            continue
        except OSError:
            break
    return sent


def reset_calls(port: int, path: str, num_calls: int) -> int:
    """Returns how many were sent."""
    headers, reset = headers_of(path), struct.pack(">I", CANCEL)
    burst = b"".join(
        frame(HEADERS, END_HEADERS, 2 * number + 1, headers) + frame(RST_STREAM, 0, 2 * number + 1, reset)
        for number in range(CALLS_PER_CONNECTION)
    )
    num_sent = 0
    for _ in range(max(num_calls // CALLS_PER_CONNECTION, 1)):
        with connect(port) as connection:
            num_sent += pump(connection, burst) * CALLS_PER_CONNECTION // len(burst)
    return num_sent


if __name__ == "__main__":
    print(reset_calls(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
