"""The channel to one gateway, and what the front proves there."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc

from kvrelay.client.api_keys import call_metadata, stays_on_this_machine
from kvrelay.network.rpc import create_channel
from kvrelay.openai_frontend.open_requests import Client
from kvrelay.security.credentials import ChannelCredentials, Towards
from kvrelay.security.guard import AUTHORIZATION, TENANT
from kvrelay.security.principal import Role

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(eq=False, slots=True)
class _Connection:
    channel: grpc.aio.Channel
    digest: bytes
    num_calls: int = 0


class GatewayChannel:
    """New calls use changed certificates."""

    def __init__(self, address: str, towards: Towards, key: str | None) -> None:
        """`key` is the front's own. Raises ConfigError if it would cross a network in plain text."""
        self.address = address
        self._towards = towards
        credentials = towards(Role.GATEWAY)
        is_encrypted = credentials is not None and credentials.tls is not None
        self.hands_keys_on = is_encrypted or stays_on_this_machine(address)
        """Where not, only tenants are named."""
        self._prover = None if credentials is None else credentials.prover
        self._own_key: Metadata | None = None
        if key is not None:
            self._own_key = call_metadata(key, (address,), uses_proxy=False, is_encrypted=is_encrypted)
        self._current = self._connect(credentials)
        self._earlier: set[_Connection] = set()

    @asynccontextmanager
    async def calling(self) -> AsyncIterator[grpc.aio.Channel]:
        connection = await self._newest()
        connection.num_calls += 1
        try:
            yield connection.channel
        finally:
            connection.num_calls -= 1
            if connection in self._earlier and not connection.num_calls:
                self._earlier.remove(connection)
                await connection.channel.close()

    def metadata_of(self, client: Client) -> Metadata:
        tenant: Metadata = () if client.tenant is None else ((TENANT, client.tenant.encode()),)
        if client.key is None or not self.hands_keys_on:
            return (*self._own_proof(), *tenant)
        return ((AUTHORIZATION, f"Bearer {client.key}"), *tenant)

    def _own_proof(self) -> Metadata:
        if self._own_key is not None:
            return self._own_key
        return () if self._prover is None else ((AUTHORIZATION, f"Bearer {self._prover(self.address)}"),)

    async def close(self) -> None:
        for connection in (self._current, *self._earlier):
            await connection.channel.close()

    async def _newest(self) -> _Connection:
        credentials = self._towards(Role.GATEWAY)
        if credentials is not None and credentials.digest != self._current.digest:
            replaced, self._current = self._current, self._connect(credentials)
            if replaced.num_calls:
                self._earlier.add(replaced)
            else:
                await replaced.channel.close()
        return self._current

    def _connect(self, credentials: ChannelCredentials | None) -> _Connection:
        if credentials is None:
            return _Connection(create_channel(self.address), b"")
        return _Connection(
            create_channel(self.address, credentials=replace(credentials, prover=None)), credentials.digest
        )
