"""The pytest plugin: fixtures, and nothing else. Imports nothing of kvrelay before a fixture is used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvrelay.testing import FaultCluster

try:
    import pytest_asyncio
except ImportError:  # asynchronous fixtures need it; a suite without it may have kvrelay installed all the same
    pass
else:

    @pytest_asyncio.fixture
    async def kvrelay_cluster() -> AsyncIterator[Callable[..., Any]]:
        """Starts clusters: `cluster = await kvrelay_cluster(num_decode=2)`, arguments as `kvrelay.testing.FaultCluster` has them.

        They end with the test, and where it passed, it is checked first that they hold nothing of any request any more.
        """
        from kvrelay.testing import FaultCluster

        async with AsyncExitStack() as stack:
            started: list[FaultCluster] = []

            async def start(**arguments: Any) -> FaultCluster:
                cluster = await stack.enter_async_context(FaultCluster(**arguments))
                started.append(cluster)
                return cluster

            yield start
            for cluster in started:
                cluster.heal()
                await cluster.check()
