"""The decoder of pushes and the taker of shared memory, given anything at all."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import resource
import socket
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from kvrelay.errors import TransferError
from kvrelay.kv_transfer import shared_memory
from kvrelay.kv_transfer.codec import Chunk, SharedChunk, decode_request
from kvrelay.kv_transfer.shared_memory import REGION_ID_BYTES, create_region, is_supported
from kvrelay.kv_transfer.shm_fd_passing import RegionClient, RegionServer
from kvrelay.v1 import kv_transfer_pb2 as pb
from tests.fuzz import corpus
from tests.fuzz.kv_pushes import num_descriptors
from tests.fuzz.mutations import mutate_bytes
from tests.support import left_out

NUM_MESSAGES = 20_000
ALLOCATED_PER_BYTE = 4
ALLOCATED_BYTES = 16 * 1024
"""What reading a message may take, besides so much for each byte that did arrive."""
SPARE_BYTES = 512 * 1024 * 1024
WAIT_S = 30.0

SEEDS = corpus.load("push")


def mutated_messages(seed: int, count: int) -> list[bytes]:
    generator = random.Random(seed)
    return [mutate_bytes(generator.choice(SEEDS), generator.choice(SEEDS), generator) for _ in range(count)]


def read_by_protobuf(message: bytes) -> pb.PushRequest | None:
    try:
        return pb.PushRequest.FromString(message)
    except DecodeError:
        return None


def check_decoded(message: bytes) -> bool:
    """Whether it was read; checks that protobuf reads the same, and that nothing but a
    TransferError is raised.
    """
    expected = read_by_protobuf(message)
    try:
        request = decode_request(message)
    except TransferError:
        assert expected is None, f"protobuf reads {message.hex()}"
        return False
    assert expected is not None, f"protobuf does not read {message.hex()}"
    if isinstance(request, pb.PushRequest):
        assert request == expected
        return True
    chunk, span = expected.chunk, request.span
    assert expected.WhichOneof("message") == "chunk"
    assert (span.layer_begin, span.layer_end) == (chunk.layer_begin, chunk.layer_end)
    assert (span.token_begin, span.token_end, request.digest) == (chunk.token_begin, chunk.token_end, chunk.digest)
    if isinstance(request, SharedChunk):
        assert (request.where.offset, request.where.num_bytes) == (chunk.shared.offset, chunk.shared.num_bytes)
    else:
        assert bytes(request.payload) == chunk.payload
    return True


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 50))])
def test_the_decoder_reads_what_protobuf_reads_and_refuses_the_rest(seed: int) -> None:
    outcomes = [check_decoded(message) for message in [*SEEDS, *mutated_messages(seed, NUM_MESSAGES)]]
    assert min(outcomes.count(True), outcomes.count(False)) > NUM_MESSAGES // 10, "both kinds were tried"


def test_the_decoder_takes_memory_by_what_arrived_not_by_what_is_claimed() -> None:
    """Peaks of Python's allocations; and within a limit of the process, that no more is even asked
    for.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + SPARE_BYTES, before[1]))
    tracemalloc.start()
    try:
        for message in [*SEEDS, *mutated_messages(7, 2000)]:
            # The least of some: what other threads of the process allocate meanwhile counts too.
            peak = min(_peak_of_decoding(message) for _ in range(3))
            assert peak <= ALLOCATED_PER_BYTE * len(message) + ALLOCATED_BYTES, message.hex()
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak_of_decoding(message: bytes) -> int:
    tracemalloc.reset_peak()
    current, _ = tracemalloc.get_traced_memory()
    with contextlib.suppress(TransferError):
        decode_request(message)
    return tracemalloc.get_traced_memory()[1] - current


def _virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_the_payload_of_what_is_read_is_never_longer_than_the_message() -> None:
    for message in mutated_messages(11, 2000):
        try:
            request = decode_request(message)
        except TransferError:
            continue
        if isinstance(request, Chunk):
            assert len(request.payload) <= len(message)


# --- shared memory that is handed over ------------------------------------------------------------


def _memfd(num_bytes: int, seals: int) -> int:
    descriptor = os.memfd_create("kvrelay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        return os.dup(file.fileno())


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def _socket() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


ALL_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL if is_supported() else 0
DESCRIPTORS: dict[str, Callable[[], int]] = {
    "region": lambda: _memfd(4096, ALL_SEALS),
    "may shrink": lambda: _memfd(4096, ALL_SEALS & ~fcntl.F_SEAL_SHRINK),
    "not sealed": lambda: _memfd(4096, 0),
    "empty": lambda: _memfd(0, ALL_SEALS),
    "too large": lambda: _memfd(shared_memory.MAX_REGION_BYTES + 1, ALL_SEALS),
    "claims 2^50": lambda: _memfd(2**50, ALL_SEALS),
    "file": _file,
    "pipe": _pipe,
    "socket": _socket,
    "device": lambda: os.open("/dev/zero", os.O_RDONLY),
    "folder": lambda: os.open("/", os.O_RDONLY),
    "secret": lambda: os.open("/proc/self/environ", os.O_RDONLY),
}
NAMES = (b"../../etc/passwd", b"/dev/shm/kvrelay", bytes(16), b"short", b"x" * 17, b"y" * 64, b"z" * 5000)


@pytest.fixture
async def server() -> AsyncIterator[RegionServer]:
    running = RegionServer()
    if not running.start():
        pytest.skip(left_out.MEMFD)
    yield running
    running.close()


async def knock(server: RegionServer, generator: random.Random, victim: bytes) -> None:
    """A connection that sends messages and descriptors at random, and leaves."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    await loop.sock_connect(connection, f"\0{server.endpoint.socket_name}")
    try:
        first = generator.choice(
            (server.endpoint.key, server.endpoint.key, server.endpoint.key, bytes(16), b"", generator.randbytes(64))
        )
        connection.send(first)
        for _ in range(generator.randrange(6)):
            name = generator.choice((*NAMES, victim, generator.randbytes(REGION_ID_BYTES), server.endpoint.key))
            kinds = generator.choices(list(DESCRIPTORS), k=generator.choice((0, 1, 1, 1, 2, 8)))
            _send(connection, name, kinds)
        await asyncio.sleep(0)
    except OSError:
        pass  # it was shut out
    finally:
        connection.close()


def _send(connection: socket.socket, name: bytes, kinds: list[str]) -> None:
    descriptors = [DESCRIPTORS[kind]() for kind in kinds]
    try:
        socket.send_fds(connection, [name], descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def test_messages_and_descriptors_at_random_leave_nothing_and_touch_nobody(server: RegionServer) -> None:
    client = await RegionClient.connect(server.endpoint, 4096)
    region = await client.lease()
    assert region is not None
    region.buffer[:] = content = random.Random(3).randbytes(4096)
    generator = random.Random(5)
    await knock(server, generator, region.region_id)
    before = num_descriptors()
    for _ in range(500):
        await knock(server, generator, region.region_id)
        lent = server.lend(region.region_id)
        assert bytes(lent.buffer) == content
        server.release(lent)
    async with asyncio.timeout(WAIT_S):
        while len(server._connections) > 1 or server.num_regions > 1:  # noqa: ASYNC110 - what is waited for says nothing
            await asyncio.sleep(0.005)
    assert server.num_regions == 1
    assert num_descriptors() <= before
    client.close()


@pytest.mark.parametrize("kind", [kind for kind in DESCRIPTORS if kind != "region"])
async def test_what_is_no_sealed_memory_is_not_taken(
    server: RegionServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await RegionClient.connect(server.endpoint, 4096)
    region, unused = create_region(4096)
    os.close(unused)
    monkeypatch.setattr(
        "kvrelay.kv_transfer.shm_fd_passing.create_region", lambda num_bytes: (region, DESCRIPTORS[kind]())
    )
    assert await client.lease() is None
    assert server.num_regions == 0
    client.close()
