"""One cluster of eight processes for all rows of the catalogue that leave it whole, or that it can
be made whole after.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError
from kvrelay.testing import FaultAction, FaultCluster, FaultProcess, wait_until
from kvrelay.testing.fault_cluster import OneOfFault
from kvrelay.testing.load import Outcome, Request, TokenCheck, Tokens, fault_free_tokens, make_request, run_request

BLOCK_SIZE = 8
STEP_TIMEOUT_S = 5
"""Longer than any test holds an engine that is not to count as hanging."""
LIVENESS_WINDOW_S = 3.0
"""Twice the default: a process that waits for a core is not to count as gone."""
HELD_AT_TURN = 20
HOLD_MS = 60_000
OFFSET_NAME = "wall-clock-offset"


@dataclass(slots=True)
class HeldStream:
    """A request in the middle of its output: its decode worker's engine stands still between two
    steps.

    It does not count as hanging meanwhile, and the worker's event loop goes on.
    """

    cluster: FaultCluster
    worker: FaultProcess
    outcome: "asyncio.Task[Outcome]"
    fault: OneOfFault = field(repr=False)

    def release(self) -> None:
        """It goes on."""
        self.fault.disarm()

    async def move_on(self) -> None:
        """It goes on for a few tokens, and is held again."""
        earlier, self.fault = self.fault, hold_in_the_middle(self.cluster)
        earlier.disarm()
        await self.fault.wait_until_fired()


def hold_in_the_middle(cluster: FaultCluster) -> OneOfFault:
    """The first decode worker that has had so many turns (commands and a step) from now on stands
    still before the next.
    """
    return cluster.arm_one_of("decode", "decode.turn_begins", FaultAction.WAIT, at=HELD_AT_TURN, wait_ms=HOLD_MS)


@dataclass(slots=True)
class Rig:
    """The cluster, a client of its first gateway, and the tokens that requests have without faults."""

    cluster: FaultCluster
    client: AsyncClient
    wall_clock_offset: Path
    number: int = 0

    def request(self, **changes: Any) -> Request:
        """A request that nobody has sent yet."""
        self.number += 1
        return make_request(self.number, **changes)

    async def expected(self, request: Request) -> Tokens:
        """Its tokens without a fault."""
        return (await fault_free_tokens(self.client, [request]))[request]

    async def wait_until_enough_works(self) -> None:
        """Two decode workers and a prefill worker, which both gateways know."""
        for gateway in self.cluster.of_role("gateway"):
            async with self.cluster.client(gateway.name) as client:
                await wait_until(partial(self._has_enough, client), f"{gateway.name} has enough workers", 60)

    async def _has_enough(self, client: AsyncClient) -> bool:
        try:
            names = [name.split("-")[0] for name in await self.cluster.connected_workers(client)]
        except KvrelayError:
            return False
        return names.count("decode") >= 2 and "prefill" in names

    async def run(self, request: Request) -> Outcome:
        return await run_request(self.client, request)

    @asynccontextmanager
    async def held(self, request: Request, client: AsyncClient | None = None) -> AsyncIterator[HeldStream]:
        """The request, held in the middle of its output until it is released, at the latest at the
        end of the block.

        The client has received tokens by then: those that a worker computed may still be on their
        way when it is held.
        """
        fault = hold_in_the_middle(self.cluster)
        check = TokenCheck(request.num_sequences)
        running = asyncio.create_task(run_request(client or self.client, request, check))
        stream: HeldStream | None = None
        try:
            stream = HeldStream(self.cluster, await fault.wait_until_fired(), running, fault)
            await wait_until(lambda: check.num_tokens > 0, "the client has received a token of the held request")
            assert not running.done()
            yield stream
        except BaseException:
            running.cancel()
            raise
        finally:
            (fault if stream is None else stream.fault).disarm()


@pytest.fixture(scope="session")
def wall_clock_offset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clock") / OFFSET_NAME


@pytest_asyncio.fixture(
    loop_scope="session", scope="package", params=["plain", pytest.param("secured", marks=pytest.mark.soak)]
)
async def started_rig(wall_clock_offset: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """Once as it starts by default, and once with everything switched on that protects it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "wall_clock"), prepend=os.pathsep)
        patch.setenv("WALL_CLOCK_OFFSET_FILE", str(wall_clock_offset))
        cluster = FaultCluster(
            num_gateways=2,
            num_prefill=2,
            num_decode=3,
            engine={
                "block_size": BLOCK_SIZE,
                "num_kv_blocks": 256,
                "prefill_chunk_tokens": 32,
                "step_timeout_ms": STEP_TIMEOUT_S * 1000,
            },
            requests={"local_prefill_tokens": 0},
            server={"liveness_window_ms": int(LIVENESS_WINDOW_S * 1000)},
            secured=request.param == "secured",
        )
        async with cluster, cluster.client("gateway") as client:
            rig = Rig(cluster, client, wall_clock_offset)
            await rig.expected(rig.request())
            await cluster.take_baseline()
            yield rig


@pytest_asyncio.fixture(loop_scope="session")
async def rig(started_rig: Rig) -> AsyncIterator[Rig]:
    """The cluster, with enough that works; after the test all is healed and checked to be at rest.

    What a test has killed starts again while the next one runs: of three decode workers one more
    may die meanwhile.
    """
    await started_rig.wait_until_enough_works()
    yield started_rig
    started_rig.wall_clock_offset.unlink(missing_ok=True)
    started_rig.cluster.heal()
    for process in started_rig.cluster.processes.values():
        if process.state == "T":
            await process.resume()
        if not process.is_running:
            await process.start_again()
    await started_rig.cluster.check()
