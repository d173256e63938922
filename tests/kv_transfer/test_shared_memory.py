"""Regions of shared memory: who gets one, what is refused, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from kvrelay.errors import TransferError
from kvrelay.kv_transfer import shared_memory, shm_fd_passing
from kvrelay.kv_transfer.codec import SharedChunk, SharedSlice, encode_chunk, encode_shared_chunk
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.shared_memory import create_region, is_supported
from kvrelay.kv_transfer.shared_memory_transport import SharedMemoryTransport
from kvrelay.kv_transfer.shm_fd_passing import RegionClient, RegionServer, ShmEndpoint
from prefill_worker.kv_sender import TransferResult
from tests.kv_transfer.test_push import (
    LAYOUT,
    MESSAGE_BYTES,
    NUM_TOKENS,
    REGION_BYTES,
    WAIT_S,
    Bench,
    FakePool,
    end_message,
    push_raw,
    running_bench,
)
from tests.kv_transfer.test_push import bench as bench  # a fixture
from tests.support import left_out

pytestmark = pytest.mark.skipif(not is_supported(), reason=left_out.MEMFD)

SPAN = KVSpan(0, 1, 0, 10)


@pytest.fixture
async def server() -> AsyncIterator[RegionServer]:
    running = RegionServer()
    assert running.start()
    yield running
    running.close()


@pytest.fixture
async def client(server: RegionServer) -> AsyncIterator[RegionClient]:
    connected = await RegionClient.connect(server.endpoint, REGION_BYTES)
    yield connected
    connected.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for says nothing
            await asyncio.sleep(0.005)


def num_mapped_regions() -> int:
    """Regions in this process."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:kvrelay")


async def test_what_one_side_writes_the_other_reads(server: RegionServer, client: RegionClient) -> None:
    region = await client.lease()
    assert region is not None
    region.buffer[5:8] = b"abc"
    lent = server.lend(region.region_id)
    assert (lent.num_bytes, bytes(lent.buffer[5:8])) == (REGION_BYTES, b"abc")
    with pytest.raises(TypeError):
        lent.buffer[0] = 1


async def test_a_region_has_one_push_at_a_time(server: RegionServer, client: RegionClient) -> None:
    region = await client.lease()
    assert region is not None
    lent = server.lend(region.region_id)
    with pytest.raises(TransferError):
        server.lend(region.region_id)
    server.release(lent)
    assert server.lend(region.region_id) is lent
    with pytest.raises(TransferError):
        server.lend(bytes(16))


async def test_a_region_is_used_again_after_a_complete_push_and_never_after_a_broken_one(
    server: RegionServer, client: RegionClient
) -> None:
    first = await client.lease()
    assert first is not None
    client.release(first)
    assert await client.lease() is first
    client.discard(first)
    second = await client.lease()
    assert second is not None
    assert second.region_id != first.region_id
    await until(lambda: server.num_regions == 1)
    with pytest.raises(TransferError):
        server.lend(first.region_id)


async def test_only_so_many_regions_are_taken(server: RegionServer, client: RegionClient) -> None:
    regions = [await client.lease() for _ in range(shared_memory.MAX_REGIONS)]
    assert all(regions)
    assert await client.lease() is None
    client._max_regions += 1  # a sender that does not count
    assert await client.lease() is None
    assert server.num_regions == shared_memory.MAX_REGIONS
    assert not client.is_closed


@pytest.mark.parametrize("key", [bytes(16), b"", b"short"])
async def test_without_the_key_nothing_is_taken(server: RegionServer, key: bytes) -> None:
    endpoint = ShmEndpoint(server.endpoint.socket_name, key)
    client = await RegionClient.connect(endpoint, REGION_BYTES)
    assert await client.lease() is None
    await until(lambda: client.is_closed)
    assert server.num_regions == 0


async def test_a_connection_that_shows_no_key_is_ended(monkeypatch: pytest.MonkeyPatch, server: RegionServer) -> None:
    monkeypatch.setattr(shm_fd_passing, "KEY_TIMEOUT_S", 0.05)
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.setblocking(False)
    await asyncio.get_running_loop().sock_connect(silent, f"\0{server.endpoint.socket_name}")
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(silent, 1), WAIT_S) == b""
    silent.close()


async def ended_at_once(server: RegionServer) -> bool:
    """Whether the server ends a new connection before its key could be late."""
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.setblocking(False)
    await asyncio.get_running_loop().sock_connect(stranger, f"\0{server.endpoint.socket_name}")
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(stranger, 1), WAIT_S) == b""
    finally:
        stranger.close()


async def test_another_user_is_not_asked_for_a_key(monkeypatch: pytest.MonkeyPatch, server: RegionServer) -> None:
    monkeypatch.setattr(shm_fd_passing, "KEY_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert await ended_at_once(server)


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch, server: RegionServer) -> None:
    monkeypatch.setattr(shm_fd_passing, "KEY_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(shm_fd_passing, "MAX_CONNECTIONS", 1)
    first = await RegionClient.connect(server.endpoint, REGION_BYTES)
    assert await first.lease() is not None
    assert await ended_at_once(server)
    first.close()


def unsealed() -> int:
    descriptor = os.memfd_create("kvrelay")
    os.ftruncate(descriptor, 4096)
    return descriptor


def too_large(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(shared_memory, "MAX_REGION_BYTES", 4096)
    return create_region(8192)[1]


def regular_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        return os.dup(file.fileno())


@pytest.mark.parametrize("kind", ["unsealed", "too large", "regular file"])
async def test_memory_that_could_do_harm_is_not_taken(
    server: RegionServer, client: RegionClient, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = {"unsealed": unsealed, "too large": lambda: too_large(monkeypatch), "regular file": regular_file}[
        kind
    ]()
    region, other = create_region(4096)
    os.close(other)
    monkeypatch.setattr(shm_fd_passing, "create_region", lambda num_bytes: (region, descriptor))
    assert await client.lease() is None
    assert server.num_regions == 0


async def test_a_region_cannot_be_resized() -> None:
    _, descriptor = create_region(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0)
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)


async def test_a_client_that_ends_leaves_no_region(server: RegionServer, client: RegionClient) -> None:
    for _ in range(3):
        await client.lease()
    assert num_mapped_regions() > 0
    client.close()
    await until(lambda: server.num_regions == 0)
    assert num_mapped_regions() == 0


CHILD = """
import asyncio, sys
from kvrelay.kv_transfer.shm_fd_passing import RegionClient, ShmEndpoint, RegionServer

async def main(role, name, key):
    if role == "client":
        client = await RegionClient.connect(ShmEndpoint(name, bytes.fromhex(key)), 1 << 20)
        (await client.lease()).buffer[:] = bytes(1 << 20)
        print("ready", flush=True)
    else:
        server = RegionServer()
        server.start()
        print(server.endpoint.socket_name, server.endpoint.key.hex(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def start_child(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Another process, and the first line that it wrote."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, child.stdout.readline()


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


async def test_a_prefill_worker_that_is_killed_leaves_nothing(server: RegionServer) -> None:
    files_before = set(os.listdir("/dev/shm"))
    child, line = await asyncio.to_thread(start_child, "client", server.endpoint.socket_name, server.endpoint.key.hex())
    assert line == "ready\n"
    assert server.num_regions == 1
    assert set(os.listdir("/dev/shm")) <= files_before
    await asyncio.to_thread(kill, child)
    await until(lambda: server.num_regions == 0)
    assert num_mapped_regions() == 0


async def test_a_decode_worker_that_is_killed_leaves_nothing() -> None:
    child, line = await asyncio.to_thread(start_child, "server", "", "")
    name, key = line.split()
    client = await RegionClient.connect(ShmEndpoint(name, bytes.fromhex(key)), REGION_BYTES)
    region = await client.lease()
    assert region is not None
    client.release(region)
    await asyncio.to_thread(kill, child)
    await until(lambda: client.is_closed)
    assert await client.lease() is None
    del region
    assert num_mapped_regions() == 0


# --- Pushes


def shared(bench: Bench, **changes: bool) -> SharedMemoryTransport:
    return SharedMemoryTransport(bench.transport, REGION_BYTES, **changes)


async def send_all(bench: Bench, transport: SharedMemoryTransport) -> TransferResult | TransferError:
    sender = bench.send(FakePool(seed=1), transport)
    sender.announce_cached(NUM_TOKENS)
    sender.finish(bench.tokens())
    return await bench.outcome()


async def test_without_a_common_namespace_kv_goes_over_grpc_and_it_is_asked_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.memory.endpoint = ShmEndpoint("kvrelay-nobody-listens-here", bytes(16))
    num_calls = 0
    connect = RegionClient.connect

    async def counted(endpoint: ShmEndpoint, region_bytes: int) -> RegionClient:
        nonlocal num_calls
        num_calls += 1
        return await connect(endpoint, region_bytes)

    monkeypatch.setattr(RegionClient, "connect", counted)
    transport = shared(bench)
    outcome = await send_all(bench, transport)
    assert isinstance(outcome, TransferResult)
    assert outcome.transport == "grpc"
    (await transport.open(bench.address, bench.plan())).close(is_complete=False)
    assert num_calls == 1
    await transport.close()


async def test_a_worker_that_takes_no_memory_is_sent_kv_over_grpc(bench: Bench) -> None:
    bench.memory.close()
    transport = shared(bench)
    outcome = await send_all(bench, transport)
    assert isinstance(outcome, TransferResult)
    assert outcome.transport == "grpc"
    await transport.close()


async def test_when_memory_must_be_shared_a_push_without_it_fails(bench: Bench) -> None:
    bench.memory.close()
    transport = shared(bench, is_required=True)
    outcome = await send_all(bench, transport)
    assert isinstance(outcome, TransferError)
    assert "no memory can be shared" in outcome.message
    await transport.close()


async def test_more_pushes_than_regions_go_over_grpc(bench: Bench) -> None:
    transport = shared(bench)
    for _ in range(shared_memory.MAX_REGIONS):
        await (await transport._client(bench.address)).lease()  # type: ignore[union-attr]
    outcome = await send_all(bench, transport)
    assert isinstance(outcome, TransferResult)
    assert outcome.transport == "grpc"
    await transport.close()


async def test_a_decode_worker_that_comes_back_is_connected_to_again(bench: Bench) -> None:
    transport = shared(bench, is_required=True)
    client = await transport._client(bench.address)
    assert client is not None
    bench.memory.close()
    await until(lambda: client.is_closed)
    assert bench.memory.start()
    outcome = await send_all(bench, transport)
    assert isinstance(outcome, TransferResult)
    assert outcome.transport == "shared-memory"
    await transport.close()


@pytest.mark.parametrize(
    "where",
    [
        SharedSlice(REGION_BYTES - MESSAGE_BYTES + 1, MESSAGE_BYTES),
        SharedSlice(REGION_BYTES, MESSAGE_BYTES),
        SharedSlice(2**64 - 1, MESSAGE_BYTES),
        SharedSlice(0, MESSAGE_BYTES - 1),
        SharedSlice(0, 2**63),
        SharedSlice(0, 0),
    ],
    ids=str,
)
async def test_a_chunk_outside_of_the_region_is_refused_and_not_written(bench: Bench, where: SharedSlice) -> None:
    client = await RegionClient.connect(bench.memory.endpoint, REGION_BYTES)
    region = await client.lease()
    assert region is not None
    good = bench.chunk(SPAN, bytes(MESSAGE_BYTES))
    message = encode_shared_chunk(SharedChunk(SPAN, where, good.digest))
    names, code = await push_raw(bench, bench.plan(), [message], region.region_id)
    assert (names, code) == (["chunk_refused"], grpc.StatusCode.DATA_LOSS)
    assert bench.pool.num_imports == 0
    client.close()


@pytest.mark.parametrize("region_id", [bytes(16), b"short"])
async def test_a_push_with_a_region_that_is_not_known_fails(bench: Bench, region_id: bytes) -> None:
    assert await push_raw(bench, bench.plan(), [], region_id) == ([], grpc.StatusCode.DATA_LOSS)
    assert (await bench.end_at_receiver()).first_tokens is None


async def test_a_shared_chunk_without_a_region_is_refused(bench: Bench) -> None:
    good = bench.chunk(SPAN)
    message = encode_shared_chunk(SharedChunk(SPAN, SharedSlice(0, MESSAGE_BYTES), good.digest))
    names, code = await push_raw(bench, bench.plan(), [message])
    assert (names, code) == (["chunk_refused"], grpc.StatusCode.DATA_LOSS)


async def test_a_refused_chunk_may_come_behind_the_end(bench: Bench) -> None:
    whole = bench.chunk(KVSpan(0, LAYOUT.num_layers, 0, NUM_TOKENS))
    bad = bench.chunk(whole.span, attempt=2)
    messages = [encode_chunk(bad), end_message(bench, 1), encode_chunk(whole)]
    names, code = await push_raw(bench, bench.plan(), messages)
    assert (names, code) == (["chunk_refused", "chunk_accepted", "complete"], grpc.StatusCode.OK)
    assert (await bench.end_at_receiver()).first_tokens is not None


async def test_a_push_that_is_broken_off_gives_its_region_back_to_nobody() -> None:
    async with running_bench() as bench:
        transport = shared(bench, is_required=True)
        bench.send(FakePool(seed=1), transport).cancel()
        await bench.outcome()
        sender = bench.send(FakePool(seed=1), transport)
        sender.announce(0, 0, 10)
        assert await asyncio.to_thread(bench.pool.entered.wait, WAIT_S)
        assert bench.memory.num_regions >= 1
        sender.cancel()
        await bench.outcome()
        await until(lambda: bench.memory.num_regions == 0)
        await transport.close()
