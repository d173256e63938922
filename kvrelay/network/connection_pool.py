"""More connections where calls at once are more than one connection takes.

    calls  0 ... 99 | 100 ... 199 | ... | 700 ... 799 | more
    on     the 1st  | the 2nd     |     | the 8th     | the one with the fewest

A server's connection takes 300 calls by default; further ones wait in gRPC.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import threading
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import grpc

CALLS_PER_CONNECTION = 100
MAX_CONNECTIONS = 8

ChannelT = TypeVar("ChannelT")


class _Connection(Generic[ChannelT]):
    def __init__(self, channel: ChannelT) -> None:
        self.channel = channel
        self.num_calls = 0


class ConnectionPool(Generic[ChannelT]):
    """Channels of one connection each, made when needed. Any thread may use it."""

    def __init__(self, create: Callable[[], ChannelT]) -> None:
        self._create = create
        self._lock = threading.Lock()
        self._connections: list[_Connection[ChannelT]] = []

    @property
    def channels(self) -> list[ChannelT]:
        return [connection.channel for connection in self._connections]

    @property
    def num_calls(self) -> int:
        return sum(connection.num_calls for connection in self._connections)

    def take(self) -> _Connection[ChannelT]:
        """For one call. `give_back` must follow."""
        with self._lock:
            connection = self._with_room()
            connection.num_calls += 1
            return connection

    def give_back(self, connection: _Connection[ChannelT]) -> None:
        with self._lock:
            connection.num_calls -= 1

    def _with_room(self) -> _Connection[ChannelT]:
        for connection in self._connections:
            if connection.num_calls < CALLS_PER_CONNECTION:
                return connection
        if len(self._connections) < MAX_CONNECTIONS:
            self._connections.append(_Connection(self._create()))
            return self._connections[-1]
        return min(self._connections, key=lambda connection: connection.num_calls)


class PooledChannel(grpc.aio.Channel):
    """The part of an asyncio channel that stubs use."""

    def __init__(self, create: Callable[[], grpc.aio.Channel]) -> None:
        self.pool = ConnectionPool(create)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for channel in self.pool.channels:
            await channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        raise NotImplementedError("a pool's connections have a state each")

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        raise NotImplementedError("a pool's connections have a state each")

    async def channel_ready(self) -> None:
        raise NotImplementedError("a pool's connections are made when they are needed")

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return self._begin(lambda channel: channel.unary_unary(*method, **options))

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return self._begin(lambda channel: channel.unary_stream(*method, **options))

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return self._begin(lambda channel: channel.stream_unary(*method, **options))

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return self._begin(lambda channel: channel.stream_stream(*method, **options))

    def _begin(self, method_of: Callable[[Any], Any]) -> Callable[..., Any]:
        def begin(*arguments: Any, **options: Any) -> Any:
            connection = self.pool.take()
            try:
                call = method_of(connection.channel)(*arguments, **options)
            except BaseException:
                self.pool.give_back(connection)
                raise
            call.add_done_callback(lambda _: self.pool.give_back(connection))
            return call

        return begin


class PooledSyncChannel(grpc.Channel):
    """The part of a blocking channel that stubs use."""

    def __init__(self, create: Callable[[], grpc.Channel]) -> None:
        self.pool = ConnectionPool(create)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for channel in self.pool.channels:
            channel.close()

    def subscribe(self, callback: Callable[..., None], try_to_connect: bool = False) -> None:
        raise NotImplementedError("a pool's connections have a state each")

    def unsubscribe(self, callback: Callable[..., None]) -> None:
        raise NotImplementedError("a pool's connections have a state each")

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return self._ask(lambda channel: channel.unary_unary(*method, **options))

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return self._ask(lambda channel: channel.stream_unary(*method, **options))

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return self._begin(lambda channel: channel.unary_stream(*method, **options))

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return self._begin(lambda channel: channel.stream_stream(*method, **options))

    def _ask(self, method_of: Callable[[Any], Any]) -> Callable[..., Any]:
        def ask(*arguments: Any, **options: Any) -> Any:
            connection = self.pool.take()
            try:
                return method_of(connection.channel)(*arguments, **options)
            finally:
                self.pool.give_back(connection)

        return ask

    def _begin(self, method_of: Callable[[Any], Any]) -> Callable[..., Any]:
        def begin(*arguments: Any, **options: Any) -> Any:
            connection = self.pool.take()
            try:
                call = method_of(connection.channel)(*arguments, **options)
            except BaseException:
                self.pool.give_back(connection)
                raise
            if not call.add_callback(lambda: self.pool.give_back(connection)):  # it has ended
                self.pool.give_back(connection)
            return call

        return begin
