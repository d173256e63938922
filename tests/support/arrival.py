"""A TCP proxy that knows when a client of gRPC has taken in the end of a call.

Behind the frame that ends it, it sends a PING. The client's answer says that it has read both, even
if the client's event loop stands still: gRPC reads in threads of its own.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support.raw_http2 import DATA, HEADERS, HOST, PING, PREFACE, RST_STREAM, frame

ACK = END_STREAM = 1
ASKED = b"has come"
HEAD_BYTES = 9


class EndWatch:
    """Of the first connection to `address`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server((HOST, 0))
        self._open = [self._listener]
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        self.has_arrived = threading.Event()
        """The end of a call has reached the client."""

    def serve(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection((HOST, self._port), 30)
        server.settimeout(None)
        self._open += [client, server]
        threading.Thread(target=self._pass, args=(client, server, self._without_answer, PREFACE), daemon=True).start()
        self._pass(server, client, self._with_question)

    def close(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _pass(
        self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes], begin: bytes = b""
    ) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as frames:
            target.sendall(frames.read(len(begin)))
            while len(head := frames.read(HEAD_BYTES)) == HEAD_BYTES:
                target.sendall(change(head + frames.read(int.from_bytes(head[:3]))))
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _with_question(self, sent: bytes) -> bytes:
        kind, flags = sent[3], sent[4]
        ends = kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM)
        return sent + frame(PING, 0, 0, ASKED) if ends else sent

    def _without_answer(self, sent: bytes) -> bytes:
        if sent[3] == PING and sent[4] & ACK and sent[HEAD_BYTES:] == ASKED:
            self.has_arrived.set()
            return b""
        return sent


@contextmanager
def watching_ends(port: int) -> Iterator[EndWatch]:
    """In threads of its own; `port` is the server's."""
    watch = EndWatch(port)
    threading.Thread(target=watch.serve, daemon=True).start()
    try:
        yield watch
    finally:
        watch.close()
