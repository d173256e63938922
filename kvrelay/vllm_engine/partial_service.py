"""The calls of VllmEngine that neither gateways nor workers serve."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from typing import Any

import grpc

from kvrelay.errors import UnsupportedError
from kvrelay.vllm_engine.messages import Message, engine_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class PartialVllmEngine(engine_grpc.VllmEngineServicer):  # type: ignore[misc]  # its base is not typed
    async def FlushCache(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("prefix caches are not flushed: they hold nothing that may not be used")

    async def Embed(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("embeddings are not computed; ask for generated text")

    async def StartProfile(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("engines are not profiled through this service; see docs/guides/measure.md")

    async def StopProfile(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("engines are not profiled through this service; see docs/guides/measure.md")

    async def SubscribeKvEvents(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("events of single KV blocks are not published; GetLoads says how full workers are")
