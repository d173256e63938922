"""Fixtures of the state's contract: a store behind each kind of url."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.state_store import StateStore
from tests.support.redis_deployments import Deployment, cluster, single
from tests.support.sentinels import watched

DEPLOYMENTS: dict[str, Callable[[Path], AbstractAsyncContextManager[Deployment]]] = {
    "valkey": single,
    "socket": partial(single, on_socket=True),
    "redis": partial(single, uses_tls=True),
    "valkey cluster": cluster,
    "redis cluster": partial(cluster, uses_tls=True),
    "valkey sentinel": watched,
    "redis sentinel": partial(watched, uses_tls=True),
}
"""`redis`: Debian's, over TLS."""


@pytest.fixture(scope="module", params=list(DEPLOYMENTS))
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Shared by the tests of a module, whose event loops are others."""
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as folder:
        context = DEPLOYMENTS[request.param](Path(folder))
        started = runner.run(_enter(context))
        try:
            yield started
        finally:
            runner.run(_leave(context))


async def _enter(context: AbstractAsyncContextManager[Deployment]) -> Deployment:
    return await context.__aenter__()


async def _leave(context: AbstractAsyncContextManager[Deployment]) -> None:
    await context.__aexit__(None, None, None)


@pytest.fixture
async def connection(deployment: Deployment) -> AsyncIterator[RedisConnection]:
    await deployment.empty()
    # More than production's 200 ms, because a busy test machine is no fault.
    async with RedisConnection(deployment.url, timeout_ms=20_000) as opened:
        yield opened


@pytest.fixture
def store(connection: RedisConnection) -> StateStore:
    """The store of gateway g1."""
    return StateStore(connection, "g1")
