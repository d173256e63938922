"""Random lives of one request in a real server and in the model that simulations run on: scripts
and model say the same.

So the simulated Redis is what the Lua is, and the table of moves, the owner, the attempt and the
log are checked in every order of calls: of two gateways, of zombies, of takeovers, of a server that
loses everything.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvrelay.core.request_state import RequestState, check_edge, is_terminal
from kvrelay.errors import KvrelayError
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.request_list import RequestList
from kvrelay.state.request_record import RequestRecord
from kvrelay.state.state_store import StateStore
from kvrelay.state.store_health import StoreHealth
from tests.simulation.redis_model import RedisModel
from tests.support.redis_fixtures import make_record

GATEWAYS = st.sampled_from(["g1", "g2"])
ATTEMPTS = st.integers(1, 4)
STATES = st.sampled_from(list(RequestState))
FRAMES = st.lists(st.sampled_from([b"a", b"bb", b""]), max_size=3)


class ModelConnection:
    """The model behind the methods of a connection, without time."""

    def __init__(self, model: RedisModel) -> None:
        self.health = StoreHealth()
        self._model = model

    async def run_script(self, name: str, keys: list[str], arguments: tuple[Any, ...]) -> Any:
        return self._model.run(name, keys, arguments)


class NoList:
    """The list of requests has tests of its own."""

    async def add(self, request_id: str, tenant: str, create_time_ms: int, time_to_live_ms: int) -> None:
        """Lists nothing."""


class RequestMachine(RuleBasedStateMachine):
    """Calls of two gateways about one request, on both."""

    loop: asyncio.AbstractEventLoop
    connection: RedisConnection

    def __init__(self) -> None:
        super().__init__()
        self.model = RedisModel(lambda: 1_700_000_000_000)
        model_connection = cast(RedisConnection, ModelConnection(self.model))
        self.stores = {
            gateway: (StateStore(self.connection, gateway), StateStore(model_connection, gateway))
            for gateway in ("g1", "g2")
        }
        for stores in self.stores.values():
            for store in stores:
                store._request_list = cast(RequestList, NoList())
        self.seen: tuple[RequestState, int] | None = None

    @initialize()
    def empty(self) -> None:
        self.lose_everything()

    def on_both(self, gateway: str, call: Any) -> Any:
        real, model = (self.loop.run_until_complete(_outcome(call(store))) for store in self.stores[gateway])
        assert _comparable(real) == _comparable(model)
        return real

    @rule(gateway=GATEWAYS)
    def create(self, gateway: str) -> None:
        self.on_both(gateway, lambda store: store.create(make_record(gateway_id=gateway)))

    @rule(
        gateway=GATEWAYS,
        attempt=ATTEMPTS,
        state=STATES,
        step=st.sampled_from([0, 0, 0, 1, 2]),
        tokens=st.integers(0, 9),
    )
    def move(self, gateway: str, attempt: int, state: RequestState, step: int, tokens: int) -> None:
        fields = {"num_output_tokens": tokens}
        self.on_both(
            gateway, lambda store: store.transition("r1", attempt, state, new_attempt=attempt + step, fields=fields)
        )

    @rule(gateway=GATEWAYS)
    def move_on(self, gateway: str) -> None:
        """Along an edge, which random moves seldom find."""
        if self.seen is not None and not is_terminal(self.seen[0]):
            state, attempt = self.seen
            target = next(target for target in RequestState if check_edge(state, attempt, target, attempt))
            self.on_both(gateway, lambda store: store.transition("r1", attempt, target))

    @rule(gateway=GATEWAYS, attempt=ATTEMPTS, position=st.integers(0, 4), frames=FRAMES)
    def append(self, gateway: str, attempt: int, position: int, frames: list[bytes]) -> None:
        self.on_both(
            gateway, lambda store: store.append_frames("r1", attempt, position, frames, position + len(frames))
        )

    @rule(gateway=GATEWAYS, attempt=ATTEMPTS, state=STATES, frames=FRAMES)
    def restore(self, gateway: str, attempt: int, state: RequestState, frames: list[bytes]) -> None:
        record = replace(make_record(gateway_id=gateway), attempt=attempt, state=state)
        self.on_both(gateway, lambda store: store.restore(record, frames))

    @rule(gateway=GATEWAYS, owner=GATEWAYS, attempt=ATTEMPTS)
    def take_over(self, gateway: str, owner: str, attempt: int) -> None:
        self.on_both(gateway, lambda store: store.take_over("r1", owner, attempt))

    @rule(gateway=GATEWAYS, position=st.integers(0, 4), count=st.integers(1, 3))
    def read(self, gateway: str, position: int, count: int) -> None:
        self.on_both(gateway, lambda store: store.read_frames("r1", position, count))

    @rule(gateway=GATEWAYS, digest=st.sampled_from(["x", "y"]), request_id=st.sampled_from(["r1", "r2"]))
    def claim(self, gateway: str, digest: str, request_id: str) -> None:
        self.on_both(gateway, lambda store: store.claim_idempotency_key("t", "key", digest, request_id, 60_000))

    @rule(gateway=GATEWAYS, request_id=st.sampled_from(["r1", "r2"]))
    def release(self, gateway: str, request_id: str) -> None:
        self.on_both(gateway, lambda store: store.release_idempotency_key("t", "key", request_id))

    @rule(lost=st.sampled_from([True, False, False, False]))
    def lose(self, lost: bool) -> None:
        if lost:
            self.lose_everything()

    def lose_everything(self) -> None:
        self.loop.run_until_complete(self.connection.run(lambda client: client.flushall()))
        self.model.data = type(self.model.data)()
        self.seen = None

    @invariant()
    def the_request_moves_along_edges(self) -> None:
        """I7 and I5, of the server itself. A restored request may be anywhere ahead, but never
        behind.
        """
        record = self.loop.run_until_complete(self.stores["g1"][0].get("r1"))
        before, self.seen = self.seen, None if record is None else (record.state, record.attempt)
        if before is None or self.seen is None:
            return
        assert self.seen[1] >= before[1], "the attempt goes back"
        if is_terminal(before[0]):
            assert self.seen == before, "something leaves a final state"


async def _outcome(call: Any) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        return await call
    except KvrelayError as error:
        return type(error), error.message


def _comparable(outcome: Any) -> Any:
    """Without times, which clocks of their own make."""
    if isinstance(outcome, RequestRecord):
        return replace(outcome, update_time_ms=0, remaining_ms=0)
    return outcome


@pytest.fixture
def machine() -> Iterator[type[RequestMachine]]:
    """The machine with a server of its own."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        valkey = EmbeddedValkey()
        loop.run_until_complete(valkey.__aenter__())
        connection = RedisConnection(valkey.url, timeout_ms=5000)
        try:
            yield type("Machine", (RequestMachine,), {"loop": loop, "connection": connection})
        finally:
            loop.run_until_complete(connection.close())
            loop.run_until_complete(valkey.__aexit__(None, None, None))


def run(machine: type[RequestMachine], num_lives: int) -> None:
    chosen = settings(
        max_examples=num_lives, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_the_model_says_what_the_scripts_say(machine: type[RequestMachine]) -> None:
    run(machine, 25)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_model_says_what_the_scripts_say_in_thousands_of_lives(machine: type[RequestMachine]) -> None:
    run(machine, 2000)
