"""Makes production code run in a world: its clock, its chance, its network, its log. Everything is
put back afterwards.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any
from unittest import mock

import structlog

import gateway.gateway
import gateway.requests.starter
import gateway.state.failure_detector
import gateway.state.other_gateways
import gateway.state.writer
import gateway.workers.sessions
import kvrelay.kv_transfer.transports
from tests.simulation.network import Network, SimulatedChannel
from tests.simulation.processes import ToySalts, ToyTokenizers
from tests.simulation.virtual_time import World, no_running_loop

EXPECTED_FAILURES = frozenset({"a step failed", "a sequence fails its step"})
"""What a poisoned prompt does; every other exception that is logged is a defect."""
START_OF_WALL_CLOCK = 1_700_000_000.0
WRITER_INTERVAL_S = 0.1
"""Production's 20 ms of rest between two looks of the state writer would be most of what a
simulation does.
"""


class WallClock:
    """What `time.time` says: it may jump."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.offset_s = START_OF_WALL_CLOCK

    def __call__(self) -> float:
        return self.offset_s + self._world.now


@contextlib.contextmanager
def simulated_environment(
    world: World, network: Network, lifecycle: Callable[..., Any], log: Callable[[str], None] | None
) -> Iterator[WallClock]:
    """Within it, production code lives in the world.

    Args:
        world, network: of the simulation.
        lifecycle: what gateways take for `RequestLifecycle`.
        log: gets the lines of production's log; None drops them.
    """
    chance = random.Random(world.seed ^ 0x5EED)
    wall_clock = WallClock(world)

    def monotonic() -> float:
        return world.now

    def create_channel(address: str, *, credentials: None = None) -> SimulatedChannel:
        return SimulatedChannel(network, asyncio.get_running_loop().place, address)  # type: ignore[attr-defined]

    async def is_refused(address: str, credentials: None = None) -> bool:
        await asyncio.sleep(network.latency_s())
        return network.listener(address) is None

    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(time, "monotonic", monotonic),
        mock.patch.object(time, "time", wall_clock),
        mock.patch.object(secrets, "token_hex", lambda num_bytes=32: chance.randbytes(num_bytes).hex()),
        mock.patch.object(secrets, "token_bytes", lambda num_bytes=32: chance.randbytes(num_bytes)),
        mock.patch.object(secrets, "randbits", chance.getrandbits),
        mock.patch.object(gateway.workers.sessions, "create_channel", create_channel),
        mock.patch.object(gateway.state.other_gateways, "create_channel", create_channel),
        mock.patch.object(gateway.state.failure_detector, "create_channel", create_channel),
        mock.patch.object(gateway.state.failure_detector, "is_refused", is_refused),
        mock.patch.object(kvrelay.kv_transfer.transports, "create_channel", create_channel),
        mock.patch.object(gateway.requests.starter, "RequestLifecycle", lifecycle),
        mock.patch.object(gateway.gateway, "TokenizerCache", ToyTokenizers),
        mock.patch.object(gateway.gateway, "CacheSalts", ToySalts),
        mock.patch.object(gateway.state.writer, "SWEEP_INTERVAL_S", WRITER_INTERVAL_S),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_running_loop())
        stack.enter_context(_watched_log(world, log))
        stack.callback(random.setstate, random.getstate())
        random.seed(world.seed)
        for patch in patches:
            stack.enter_context(patch)
        yield wall_clock


@contextlib.contextmanager
def _watched_log(world: World, log: Callable[[str], None] | None) -> Iterator[None]:
    """Notes defects; everything else goes to `log`."""

    def watch(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        name = event.get("event")
        if method in ("exception", "error", "critical") and name not in EXPECTED_FAILURES:
            failure = structlog.processors.format_exc_info(logger, method, dict(event, exc_info=True)).get(
                "exception", ""
            )
            world.problems.append(f"a defect was logged: {name}: {failure}")
        if log is not None:
            details = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("event", "exc_info"))
            log(f"{name} {details}")
        raise structlog.DropEvent

    before = structlog.get_config()
    # A trace shows everything; without one only what may be a defect is worth the time.
    level = 0 if log is not None else 40
    structlog.configure(
        processors=[watch],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
