"""A confined child's side: limits itself, then answers one request at a time over its stdin.

    python run_module.py kvrelay.runtime.confined_main MODULE CPU_MS MEMORY_BYTES NICENESS

MODULE has `prepare()` and `answer(request: bytes) -> bytes`. Its stdin is a socket.

    first frame: the parent's sys.path <- stdin -> READY
    request <- stdin -> ANSWER, or LAST_ANSWER before it ends to give its memory back
"""

import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

from kvrelay.runtime.large_stack import STACK_BYTES, start_with_large_stack

READY, ANSWER, LAST_ANSWER = 0, 1, 2
HEADER = struct.Struct("<BI")
"""Kind of a frame, and the length of what follows."""
OUT_OF_MEMORY_EXIT = 3
MAX_OPEN_FILES = 16
KEPT_SHARE = 4
"""A child that keeps more than this part of its memory ends after its answer."""


class Limits(NamedTuple):
    cpu_ms: int
    memory_bytes: int
    niceness: int


def main() -> None:
    module, *numbers = sys.argv[1:]
    limits = Limits(*map(int, numbers))
    stream = socket.socket(fileno=os.dup(0))
    thread = start_with_large_stack(lambda: _serve(stream, module, limits), "confined")
    thread.join()


def _serve(stream: socket.socket, module: str, limits: Limits) -> None:
    sys.path += [path for path in json.loads(_receive(stream)) if path not in sys.path]
    handler = importlib.import_module(module)
    handler.prepare()
    kept_bytes = _confine(limits) + limits.memory_bytes // KEPT_SHARE
    _send(stream, READY, b"")
    while request := _receive(stream):
        answer = _timed(handler.answer, request, limits.cpu_ms)
        is_last = _address_space_bytes() > kept_bytes
        _send(stream, LAST_ANSWER if is_last else ANSWER, answer)
        if is_last:
            return


def _timed(answer: Callable[[bytes], bytes], request: bytes, cpu_ms: int) -> bytes:
    # SIGPROF ends the process wherever it is, also in native code, and though its parent is gone.
    signal.setitimer(signal.ITIMER_PROF, cpu_ms / 1000)
    try:
        return answer(request)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_EXIT)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _confine(limits: Limits) -> int:
    """Returns the address space that the child begins with, in bytes; 0 where it is unknown."""
    with open(os.devnull, "wb") as nothing:
        for output in (0, 1, 2):
            os.dup2(nothing.fileno(), output)
    os.nice(limits.niceness)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    base = _address_space_bytes()
    if base:
        # A second large stack takes address space, not memory.
        _limit(resource.RLIMIT_AS, base + limits.memory_bytes + STACK_BYTES)
    return base


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _address_space_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # macOS has no such file, and ignores the limit
        return 0


def _receive(stream: socket.socket) -> bytes:
    """Returns b"" when the parent is gone."""
    header = _exactly(stream, HEADER.size)
    return _exactly(stream, HEADER.unpack(header)[1]) if header else b""


def _exactly(stream: socket.socket, num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        piece = stream.recv(num_bytes - len(received))
        if not piece:
            return b""
        received += piece
    return bytes(received)


def _send(stream: socket.socket, kind: int, content: bytes) -> None:
    stream.sendall(HEADER.pack(kind, len(content)) + content)


if __name__ == "__main__":
    main()
