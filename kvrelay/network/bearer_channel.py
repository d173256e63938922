"""A channel that sends a new bearer token with every call."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import Callable
from typing import Any, Self

import grpc

from kvrelay.security.guard import AUTHORIZATION


class BearerChannel(grpc.aio.Channel):
    """Adds metadata where a call begins. An interceptor would touch each message of a stream."""

    def __init__(self, channel: grpc.aio.Channel, new_token: Callable[[], str]) -> None:
        self._channel = channel
        self._new_token = new_token

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return self._with_token(self._channel.unary_unary(*method, **options))

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return self._with_token(self._channel.unary_stream(*method, **options))

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return self._with_token(self._channel.stream_unary(*method, **options))

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return self._with_token(self._channel.stream_stream(*method, **options))

    def _with_token(self, begin: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, metadata: Any = None, **options: Any) -> Any:
            proof = (AUTHORIZATION, f"Bearer {self._new_token()}")
            return begin(*arguments, metadata=(*(metadata or ()), proof), **options)

        return call
