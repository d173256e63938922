"""The Python client of kvrelay.

    from kvrelay.client import Client

    with Client("127.0.0.1:50050") as client:
        question = [{"role": "user", "content": "Why is the sky blue?"}]
        for delta in client.generate(messages=question, max_tokens=100):
            print(delta.text, end="", flush=True)

`AsyncClient` is the same for asyncio. Both raise the errors of `kvrelay.errors`.
"""

from kvrelay.client.addresses import DEFAULT_TIMEOUT_S
from kvrelay.client.async_client import AsyncClient
from kvrelay.client.async_conversation import AsyncConversation, AsyncTurn
from kvrelay.client.async_stream import AsyncStream
from kvrelay.client.requests import GenerateOptions, SamplingOptions
from kvrelay.client.results import (
    Accepted,
    ChatMessage,
    Cluster,
    Completion,
    Delta,
    Event,
    Finished,
    GatewayInfo,
    Health,
    Output,
    RequestInfo,
    RequestPage,
    RequestState,
    ServedModel,
    Usage,
    WorkerInfo,
    WorkerRole,
)
from kvrelay.client.sync_client import Client
from kvrelay.client.sync_conversation import Conversation, Turn
from kvrelay.client.sync_stream import Stream
from kvrelay.client.tls import TLS
from kvrelay.core.response_format import ResponseFormat

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "TLS",
    "Accepted",
    "AsyncClient",
    "AsyncConversation",
    "AsyncStream",
    "AsyncTurn",
    "ChatMessage",
    "Client",
    "Cluster",
    "Completion",
    "Conversation",
    "Delta",
    "Event",
    "Finished",
    "GatewayInfo",
    "GenerateOptions",
    "Health",
    "Output",
    "RequestInfo",
    "RequestPage",
    "RequestState",
    "ResponseFormat",
    "SamplingOptions",
    "ServedModel",
    "Stream",
    "Turn",
    "Usage",
    "WorkerInfo",
    "WorkerRole",
]
