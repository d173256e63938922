"""The pytest plugin. Imports kvrelay only when a fixture is used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvrelay.testing import FaultCluster

try:
    import pytest_asyncio
except ImportError:  # suites without asynchronous fixtures do not need it
    pass
else:

    @pytest_asyncio.fixture
    async def kvrelay_cluster() -> AsyncIterator[Callable[..., Any]]:
        """Starts clusters: `cluster = await kvrelay_cluster(num_decode=2)`.

        Arguments are those of `kvrelay.testing.FaultCluster`. A cluster ends with the test. After a
        passed test it must hold nothing of any request.
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
