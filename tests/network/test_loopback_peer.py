"""Which user is at the other end of a loopback connection."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay.network import loopback_peer
from kvrelay.network.loopback_peer import is_of_this_user


@pytest.fixture(params=["127.0.0.1", "::ffff:127.0.0.1"])
def connection(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """gRPC's name of a client of this process, and the server's port."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(family) as client:
        client.connect((request.param, server.getsockname()[1]))
        yield f"ipv4:127.0.0.1:{client.getsockname()[1]}", server.getsockname()[1]


def test_a_connection_of_this_user_is_known(connection: tuple[str, int]) -> None:
    assert is_of_this_user(*connection)


def test_one_of_another_user_is_refused(connection: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not is_of_this_user(*connection)


def test_the_servers_end_is_not_taken_for_the_clients(connection: tuple[str, int]) -> None:
    peer, port = connection
    assert not is_of_this_user(f"ipv4:127.0.0.1:{port}", port)
    assert not is_of_this_user(peer, port ^ 1)


@pytest.mark.parametrize("peer", ["", "ipv4:", "ipv4:127.0.0.1:", "ipv4:192.0.2.1:5", "unix:/x", "ipv6:%5B::1%5D:5"])
def test_what_is_no_loopback_connection_is_refused(peer: str) -> None:
    assert not is_of_this_user(peer, 5)


def test_a_system_that_does_not_tell_is_trusted(
    connection: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loopback_peer, "_TABLES", (tmp_path / "absent",))
    assert is_of_this_user(*connection)
