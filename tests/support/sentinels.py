"""A primary, a replica, and three Sentinels that watch them."""

import os
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis.asyncio
import redis.exceptions

from kvrelay.runtime.child_process import ChildProcess
from kvrelay.state.embedded_valkey import EmbeddedValkey, _free_port, find_binary
from tests.support.redis_deployments import (
    START_TIMEOUT_MS,
    Certificates,
    Deployment,
    follows,
    redis_binary,
)
from tests.support.redis_fixtures import BOUND_S, admin_of, eventually

SERVICE = "my-primary.1"
NUM_SENTINELS, QUORUM = 3, 2
PATIENT_DOWN_AFTER_MS = 60_000
"""A busy machine is no dead primary."""
STOP_GRACE_S = 1.0


@dataclass(frozen=True)
class WatchedDeployment(Deployment):
    sentinels: Sequence["SentinelProcess"] = ()

    async def address_of_primary(self) -> tuple[str, int]:
        """As the first Sentinel says."""
        async with self.sentinels[0].client() as client:
            host, port = await client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return host.decode(), int(port)


class SentinelProcess:
    """Of `binary`, with a password of its own. `lines`: more of its file."""

    def __init__(self, folder: Path, binary: Path, password: str, lines: Sequence[str]) -> None:
        self._folder = folder
        self.port = _free_port()
        self.password = password
        self._lines = (
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {folder}",
            f"requirepass {password}",
            *lines,
        )
        self._process = ChildProcess(
            "sentinel", (str(binary), str(folder / "sentinel.conf"), "--sentinel"), os.environ, _ignore
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        options: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "password": self.password, "protocol": 2}
        async with redis.asyncio.Redis(**options) as client:
            yield client

    async def __aenter__(self) -> "SentinelProcess":
        self._folder.mkdir()
        (self._folder / "sentinel.conf").write_text("\n".join(self._lines) + "\n")
        await self._process.start()
        await eventually(self._answers, 2 * BOUND_S)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._process.stop(STOP_GRACE_S)

    async def _answers(self) -> bool:
        assert self._process.exit_code is None, list(self._process.tail)
        try:
            async with self.client() as client:
                return bool(await client.ping())
        except redis.exceptions.ConnectionError:
            return False

    async def knows_all(self) -> bool:
        async with self.client() as client:
            state = await client.sentinel_master(SERVICE)
        return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == NUM_SENTINELS - 1)


@asynccontextmanager
async def watched(
    folder: Path,
    *,
    uses_tls: bool = False,
    down_after_ms: int = PATIENT_DOWN_AFTER_MS,
    primary_options: Sequence[str] = (),
) -> AsyncIterator[WatchedDeployment]:
    certificates = Certificates(folder / "certificates") if uses_tls else None
    binary = redis_binary() if uses_tls else None
    async with AsyncExitStack() as stack:
        password = secrets.token_hex(16)
        servers: list[EmbeddedValkey] = []
        ports: list[int] = []
        for number in range(2):
            # A replica writes what it gets to a file.
            (folder / f"server-{number}").mkdir()
            options = ["--dir", f"{folder}/server-{number}", "--masterauth", password]
            options += ["--repl-diskless-sync-delay", "0", *(primary_options if number == 0 else ())]
            tls_port = _free_port()
            if certificates is not None:
                options += certificates.server_options(tls_port)
            server = EmbeddedValkey(256, START_TIMEOUT_MS, binary, on_tcp=True, more_options=options)
            server.password = password
            servers.append(await stack.enter_async_context(server))
            ports.append(server.port if certificates is None else tls_port)
        async with admin_of(servers[1]) as replica:
            await replica.execute_command("REPLICAOF", "127.0.0.1", ports[0])
            await eventually(partial(follows, replica), 2 * BOUND_S)
        sentinels = []
        for number in range(NUM_SENTINELS):
            lines = [
                f"sentinel monitor {SERVICE} 127.0.0.1 {ports[0]} {QUORUM}",
                f"sentinel auth-pass {SERVICE} {password}",
                f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}",
                f"sentinel failover-timeout {SERVICE} 10000",
            ]
            tls_port = _free_port()
            if certificates is not None:
                lines = [*certificates.lines(tls_port), *lines]
            process = SentinelProcess(
                folder / f"sentinel-{number}", binary or find_binary(), f"{password}-of-sentinels", lines
            )
            sentinels.append(
                (await stack.enter_async_context(process), process.port if certificates is None else tls_port)
            )
        for process, _ in sentinels:
            await eventually(process.knows_all, 2 * BOUND_S)
        hosts = ",".join(f"127.0.0.1:{port}" for _, port in sentinels)
        scheme, query = ("redis", "") if certificates is None else ("rediss", f"&{certificates.query}")
        url = f"{scheme}+sentinel://:{password}@{hosts}/{SERVICE}/0?sentinel_password={password}-of-sentinels{query}"
        yield WatchedDeployment(url, servers, 1, tuple(process for process, _ in sentinels))


async def fails_over(client: Any) -> bool:
    """Refused until the Sentinel has chosen the replica for a good one."""
    try:
        await client.execute_command("SENTINEL", "FAILOVER", SERVICE)
    except redis.exceptions.ResponseError as error:
        if not any(sign in str(error) for sign in ("NOGOODSLAVE", "INPROG")):
            raise
        return False
    return True


def _ignore(name: str, line: str) -> None:
    """The process keeps its last lines itself."""
