"""Header lists that are large, or expand to much: the gateway does not stay larger for them."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster
from tests.integration.clusters import cluster_of
from tests.support import raw_http2
from tests.support.process_memory import MAX_GROWN_BYTES, growth_at_rest, memory_of
from tests.support.raw_http2 import CONTINUATION, END_HEADERS, HEADERS, frame, literal

NUM_BURSTS = 4
STARVED_TIMEOUT_S = 60.0
"""Until a gateway that has little of a core has read all; nothing that it kept would go by then."""
CALL = raw_http2.headers_of("/kvrelay.v1.InferenceService/ListModels")
VALUE_BYTES = 3800
KEPT = b"\x40\x03x-b" + bytes((0x7F, (VALUE_BYTES - 127) % 128 | 128, (VALUE_BYTES - 127) // 128)) + b"v" * VALUE_BYTES
"""A header that the peer keeps in its table, of which it is the newest."""
AGAIN = b"\xbe"
"""The newest header of the table, in one byte."""

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


def calls(number: int, *parts: bytes, first: bytes = b"") -> bytes:
    """Each with these parts of a header list, the parts after the first as CONTINUATION frames."""
    sent = []
    for each in range(number):
        blocks = [CALL + (first if each == 0 else b"") + parts[0], *parts[1:]]
        for place, block in enumerate(blocks):
            flags = END_HEADERS if place == len(blocks) - 1 else 0
            sent.append(frame(CONTINUATION if place else HEADERS, flags, 2 * each + 1, block))
    return b"".join(sent)


BOMBS: dict[str, Callable[[], bytes]] = {
    "large": lambda: calls(200, literal(b"x-a", b"b" * 120) * 100),
    "compressed": lambda: calls(200, AGAIN * 3000, first=KEPT),
    "in CONTINUATION frames": lambda: calls(200, *[literal(b"x-a", b"b" * 120) * 100] * 4),
    "in thousands of CONTINUATION frames": lambda: calls(1, *[literal(b"x-a", b"b" * 120) * 100] * 4000),
    "compressed, in CONTINUATION frames": lambda: calls(50, b"", *[AGAIN * 16_000] * 3, first=KEPT),
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster() -> AsyncIterator[tuple[LocalCluster, int]]:
    """A gateway, and what it had in memory when it was ready."""
    async with cluster_of([], []) as cluster, AsyncClient(cluster.gateway_address) as client:
        await client.cluster()
        yield cluster, memory_of(cluster.pid("gateway"))


@pytest.mark.parametrize("name", BOMBS)
async def test_a_gateway_keeps_little_of_header_lists_that_are_too_large(
    cluster: tuple[LocalCluster, int], name: str
) -> None:
    running, memory = cluster
    gateway, port, bomb = running.pid("gateway"), running.gateway.server.port, BOMBS[name]()
    async with AsyncClient(running.gateway_address) as client:
        for _ in range(NUM_BURSTS):
            with raw_http2.connect(port) as connection:
                assert await asyncio.to_thread(raw_http2.pump, connection, bomb)
            await client.cluster()
        assert await growth_at_rest(gateway, memory, STARVED_TIMEOUT_S) < MAX_GROWN_BYTES
    assert running.pid("gateway") == gateway
