"""What /proc says of a process: this one."""

import os
import socket
import subprocess

from kvrelay.testing.process_files import (
    kinds_of_descriptors,
    num_connections_to,
    num_descriptors,
    owners_of_local_ports,
)


def test_connections_are_told_by_where_they_lead() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert num_connections_to(os.getpid(), port) == 0
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as accepted:
            own_port = client.getsockname()[1]
            assert num_connections_to(os.getpid(), port) == 1
            assert num_connections_to(os.getpid(), own_port) == 1
            assert owners_of_local_ports({own_port}, [os.getpid()]) == {own_port: os.getpid()}
            assert owners_of_local_ports({own_port}, []) == {}
            kinds = kinds_of_descriptors(os.getpid())
            assert kinds[f"tcp {own_port} to {port}"] == kinds[f"tcp {port} to {own_port}"] == 1
            assert accepted.fileno() >= 0
        assert num_connections_to(os.getpid(), port) == 0


def test_descriptors_are_counted_and_told_by_kind() -> None:
    null = subprocess.DEVNULL
    with subprocess.Popen(["sleep", "60"], stdin=null, stdout=null, stderr=null) as child:
        try:
            assert num_descriptors(child.pid) == 3
            assert kinds_of_descriptors(child.pid) == {"/dev/null": 3}
        finally:
            child.kill()
