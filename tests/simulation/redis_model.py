"""What Redis with kvrelay's scripts does, as plain Python: the store of simulated processes, and
the model that tests compare the scripts with.

Data lives in `RedisModel`, which several `SimulatedRedisConnection`s share, each with a breaker
like the real one's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.errors import StoreFullError, UnavailableError
from kvrelay.state.state_store import owner_key, request_key
from kvrelay.state.store_health import StoreHealth
from tests.simulation.virtual_time import World

TIMEOUT_S = 0.2
PING_INTERVAL_S = 0.1

Argument = str | int | bytes


def to_bytes(value: Argument) -> bytes:
    """As Redis keeps it."""
    return value if isinstance(value, bytes) else str(value).encode()


@dataclass
class RedisData:
    """Everything that is kept. Keys never expire: a simulation and a test are shorter than any
    retention.
    """

    hashes: dict[str, dict[str, bytes]] = field(default_factory=dict)
    logs: dict[str, list[bytes]] = field(default_factory=dict)
    ended_logs: set[str] = field(default_factory=set)
    leases: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    withdrawn: dict[str, None] = field(default_factory=dict)


class RedisModel:
    """The server.

    Args:
        now_ms: its clock.
    """

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.now_ms = now_ms
        self.data = RedisData()
        self.is_away = False
        self.is_full = False
        self._kept: RedisData | None = None

    def keep(self) -> None:
        """Remembers the data of now, as a replica that lags does."""
        self._kept = deepcopy(self.data)

    def fall_back(self) -> None:
        """Loses what was written since `keep`."""
        assert self._kept is not None, "kept before"
        self.data = self._kept

    def run(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """One script.

        Raises:
            StoreFullError: it may not run while the server is full.
        """
        if self.is_full and name in ("append", "claim", "create", "restore"):
            raise StoreFullError(
                "The state store is out of memory; new requests are taken when old ones are forgotten."
            )
        script: Callable[[Sequence[str], Sequence[Argument]], Any] = getattr(self, f"_{name}")
        return script(keys, arguments)

    def give_away(self, request_id: str, gateway_id: str) -> bool:
        """As a takeover does. False for a request that has ended or is not known."""
        stored = self.data.hashes.get(request_key(request_id))
        if stored is None or is_terminal(RequestState(stored["state"].decode())):
            return False
        stored |= {"gateway_id": gateway_id.encode(), "attempt": b"%d" % (int(stored["attempt"]) + 1)}
        stored["state"] = RequestState.QUEUED.value.encode()
        self._set_owner(owner_key(request_id), gateway_id)
        return True

    # --- requests

    def _create(self, keys: Sequence[str], arguments: Sequence[Argument]) -> int:
        owner, create_time_ms, remaining_ms, _, *fields = arguments
        stored = self.data.hashes.get(keys[0])
        if stored is not None:
            return int(stored["gateway_id"] == to_bytes(owner) and stored["create_time_ms"] == to_bytes(create_time_ms))
        self._write(keys[0], fields, int(remaining_ms))
        self._set_owner(keys[1], owner)
        return 1

    def _transition(self, keys: Sequence[str], arguments: Sequence[Argument]) -> bytes:
        owner, attempt, to_state, new_attempt, _, edges, paths, terminal, _, *fields = arguments
        assert isinstance(to_state, str), "a state's name"
        stored = self.data.hashes.get(keys[0])
        if stored is None:
            return b"LOST"
        state, stored_attempt = stored["state"].decode(), int(stored["attempt"])
        is_owner = stored["gateway_id"] == to_bytes(owner)
        attempt, new_attempt = int(attempt), int(new_attempt)
        if is_owner and stored_attempt == new_attempt and state == to_state:
            return b"DONE"
        if _has(terminal, state) or stored_attempt > attempt:
            return b"SUPERSEDED"
        if stored_attempt < attempt:
            return b"LOST"
        if not is_owner:
            return b"SUPERSEDED"
        if new_attempt == attempt:
            move = f"{state}>{to_state}"
            if not _has(edges, move):
                return b"LOST" if _has(paths, move) else b"SUPERSEDED"
        elif new_attempt != attempt + 1 or to_state != "QUEUED":
            return b"SUPERSEDED"
        changes: dict[str, Argument] = {"state": to_state, "attempt": new_attempt, "update_time_ms": self.now_ms()}
        stored.update({name: to_bytes(value) for name, value in changes.items()})
        stored.update(_pairs(fields))
        if _has(terminal, str(to_state)):
            self.data.ended_logs.add(keys[1])
        return b"DONE"

    def _restore(self, keys: Sequence[str], arguments: Sequence[Argument]) -> bytes:
        owner, attempt, state, remaining_ms, _, terminal, position, _, num_fields, *rest = arguments
        position, attempt = int(position), int(attempt)
        fields, frames = rest[: int(num_fields)], rest[int(num_fields) :]
        stored = self.data.hashes.get(keys[0])
        if stored is not None:
            stored_attempt, stored_state = int(stored["attempt"]), stored["state"].decode()
            same = stored_attempt == attempt and stored["gateway_id"] == to_bytes(owner)
            if _has(terminal, stored_state):
                return b"DONE" if same and stored_state == state else b"SUPERSEDED"
            if stored_attempt > attempt or (stored_attempt == attempt and not same):
                return b"SUPERSEDED"
        else:
            self.data.logs.pop(keys[1], None)
            self.data.ended_logs.discard(keys[1])
        if position > len(self.data.logs.get(keys[1], ())):
            return b"LOST"
        self._write(keys[0], fields, int(remaining_ms))
        self._set_owner(keys[2], owner)
        self._append_frames(keys[1], position, frames)
        if _has(terminal, str(state)):
            self.data.ended_logs.add(keys[1])
        return b"DONE"

    def _append(self, keys: Sequence[str], arguments: Sequence[Argument]) -> list[Argument]:
        owner, attempt, position, terminal, num_output_tokens, *frames = arguments
        position, attempt = int(position), int(attempt)
        stored = self.data.hashes.get(keys[0])
        if stored is None:
            return [b"LOST"]
        stored_attempt = int(stored["attempt"])
        if stored_attempt > attempt:
            return [b"SUPERSEDED"]
        if stored_attempt < attempt:
            return [b"LOST"]
        if stored["gateway_id"] != to_bytes(owner):
            return [b"SUPERSEDED"]
        num_frames, new_length = len(self.data.logs.get(keys[1], ())), position + len(frames)
        if _has(terminal, stored["state"].decode()):
            return [b"SUPERSEDED"] if new_length > num_frames else [b"DONE", num_frames]
        if position > num_frames:
            return [b"GAP", num_frames]
        if new_length > num_frames:
            self._append_frames(keys[1], position, frames)
            num_frames = new_length
        if num_output_tokens != "":
            stored["num_output_tokens"] = to_bytes(num_output_tokens)
        return [b"DONE", num_frames]

    def _read(self, keys: Sequence[str], arguments: Sequence[Argument]) -> list[bytes]:
        position, max_count, terminal = int(arguments[0]), int(arguments[1]), arguments[2]
        stored = self.data.hashes.get(keys[0])
        if stored is None:
            return []
        log = self.data.logs.get(keys[1], [])
        last = min(len(log), position + max_count)
        ended = _has(terminal, stored["state"].decode())
        return [b"DECODING" if ended and last < len(log) else stored["state"], *log[position:last]]

    def _record(self, keys: Sequence[str], arguments: Sequence[Argument]) -> tuple[int, list[bytes]]:
        stored = self.data.hashes.get(keys[0], {})
        return self.now_ms(), [part for name, value in stored.items() for part in (name.encode(), value)]

    def _take_over(self, keys: Sequence[str], arguments: Sequence[Argument]) -> int:
        expected_owner, expected_attempt, new_owner, token, terminal = arguments
        stored = self.data.hashes.get(keys[0])
        if stored is None:
            return 0
        if stored.get("takeover") == to_bytes(token):
            return 1
        expected = stored["gateway_id"] == to_bytes(expected_owner) and stored["attempt"] == to_bytes(expected_attempt)
        if not expected or _has(terminal, stored["state"].decode()):
            return 0
        changes = {
            "gateway_id": new_owner,
            "attempt": int(expected_attempt) + 1,
            "state": "QUEUED",
            "takeover": token,
            "prefill_worker_id": "",
            "decode_worker_id": "",
            "update_time_ms": self.now_ms(),
        }
        stored.update({name: to_bytes(value) for name, value in changes.items()})
        self._set_owner(keys[1], new_owner)
        return 1

    def _set_owner(self, key: str, gateway_id: Argument) -> None:
        self.data.hashes[key] = {"gateway_id": to_bytes(gateway_id)}

    def _write(self, key: str, fields: Sequence[Argument], remaining_ms: int) -> None:
        now_ms = self.now_ms()
        stored = self.data.hashes.setdefault(key, {})
        stored.update(update_time_ms=to_bytes(now_ms), redis_deadline_ms=to_bytes(now_ms + remaining_ms))
        stored.update(_pairs(fields))

    def _append_frames(self, log_key: str, position: int, frames: Sequence[Argument]) -> None:
        log = self.data.logs.setdefault(log_key, [])
        log.extend(to_bytes(frame) for frame in frames[len(log) - position :])

    # --- idempotency keys

    def _claim(self, keys: Sequence[str], arguments: Sequence[Argument]) -> list[bytes]:
        digest, request_id, _ = arguments
        stored = self.data.hashes.setdefault(
            keys[0], {"body_digest": to_bytes(digest), "request_id": to_bytes(request_id)}
        )
        return [stored["body_digest"], stored["request_id"]]

    def _release(self, keys: Sequence[str], arguments: Sequence[Argument]) -> int:
        stored = self.data.hashes.get(keys[0])
        if stored is None or stored["request_id"] != to_bytes(arguments[0]):
            return 0
        del self.data.hashes[keys[0]]
        return 1

    def _cache_secret(self, keys: Sequence[str], arguments: Sequence[Argument]) -> bytes:
        stored = self.data.hashes.setdefault(keys[0], {"secret": to_bytes(arguments[0])})
        return stored["secret"]

    # --- members

    def _index(self, keys: Sequence[str], arguments: Sequence[Argument]) -> int:
        return 1

    def _lease(self, keys: Sequence[str], arguments: Sequence[Argument]) -> int:
        instance_id, payload, lease_ms = arguments
        self.data.leases[str(instance_id)] = (self.now_ms() + int(lease_ms), to_bytes(payload))
        self.data.withdrawn.pop(str(instance_id), None)
        return 1

    def _members(self, keys: Sequence[str], arguments: Sequence[Argument]) -> list[list[bytes]]:
        now_ms = self.now_ms()
        payloads = [payload for ends_ms, payload in self.data.leases.values() if ends_ms > now_ms]
        return [payloads, [to_bytes(instance_id) for instance_id in self.data.withdrawn]]

    def _withdraw(self, keys: Sequence[str], arguments: Sequence[Argument]) -> int:
        self.data.leases.pop(str(arguments[0]), None)
        self.data.withdrawn[str(arguments[0])] = None
        return 1


class SimulatedRedisConnection:
    """What a process has instead of a `RedisConnection`.

    Args:
        model: the server.
        world: clock and chance.
    """

    def __init__(self, model: RedisModel, world: World) -> None:
        self.health = StoreHealth()
        self._model = model
        self._world = world
        self._recovery: asyncio.Task[None] | None = None

    async def run_script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """As `RedisConnection.run_script`: the script runs once half of the way is done, so a
        command that fails may have run.
        """
        self.health.check()
        await self._travel()
        answer = self._model.run(name, keys, arguments)
        await self._travel()
        return answer

    async def run(self, operation: Callable[[Any], Awaitable[Any]]) -> Any:
        """As `RedisConnection.run`, for the one operation that gateways need: to read a field or a list."""
        self.health.check()
        await self._travel()
        return await operation(_Client(self._model))

    async def wait_for_entry(self, stream: str, last_id: str, wait_ms: int) -> None:
        """Looks again and again, which is what the real one does when it has no connection left."""
        position = int(last_id.split("-")[0])
        give_up = self._world.now + wait_ms / 1000
        while self._world.now < give_up:
            self.health.check()
            data = self._model.data
            if len(data.logs.get(stream, ())) > position or stream in data.ended_logs:
                return
            await asyncio.sleep(0.05)

    async def _travel(self) -> None:
        await asyncio.sleep(self._world.random.uniform(0.0001, 0.001))
        if not self._model.is_away:
            return
        await asyncio.sleep(TIMEOUT_S)
        if self.health.open(TimeoutError()):
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
        raise UnavailableError("The state store does not answer; try again in a moment.")

    async def _recover(self) -> None:
        while self._model.is_away:  # noqa: ASYNC110  # a ping is how one learns of it
            await asyncio.sleep(PING_INTERVAL_S)
        self.health.close()


class _Client:
    """As much of a Redis client as reading a field takes."""

    def __init__(self, model: RedisModel) -> None:
        self._model = model

    async def execute_command(self, name: str, key: str, field: str) -> bytes | None:
        """HGET."""
        return self._model.data.hashes.get(key, {}).get(field)

    def pipeline(self, transaction: bool) -> "_EmptyLists":
        return _EmptyLists()


class _EmptyLists:
    """There is no list of requests here."""

    def __init__(self) -> None:
        self._num_commands = 0

    def execute_command(self, *command: Argument) -> None:
        self._num_commands += 1

    async def execute(self, raise_on_error: bool) -> list[list[bytes]]:
        return [[] for _ in range(self._num_commands)]


def _has(table: Argument, item: str) -> bool:
    return f",{item}," in str(table)


def _pairs(fields: Sequence[Argument]) -> dict[str, bytes]:
    return {str(name): to_bytes(value) for name, value in zip(fields[::2], fields[1::2], strict=True)}
