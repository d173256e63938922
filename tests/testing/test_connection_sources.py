"""Who is at the other end of a proxy's connection."""

import asyncio
import os
import socket
from collections.abc import Collection, Iterable

import pytest

from kvrelay.testing import connection_sources
from kvrelay.testing.connection_sources import ConnectionSources


async def test_a_connection_is_named_after_the_process_that_has_it() -> None:
    sources = ConnectionSources(lambda: {os.getpid(): "this"}, "another")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0],
    ):
        assert await sources.name_of(client.getsockname()[1]) == "this"
    assert await sources.name_of(1) == "another"


async def test_many_connections_at_once_need_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Collection[int]] = []

    def look(ports: Collection[int], pids: Iterable[int]) -> dict[int, int]:
        looks.append(ports)
        return dict.fromkeys(ports, 7)

    monkeypatch.setattr(connection_sources, "owners_of_local_ports", look)
    sources = ConnectionSources(lambda: {7: "seven"}, "another")
    names = await asyncio.gather(*(sources.name_of(port) for port in range(200)))
    assert set(names) == {"seven"}
    assert [len(ports) for ports in looks] == [200]
