"""A decode worker's session with a prefill worker, for one prompt without a gateway."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.errors import TransferError
from kvrelay.network.rpc import create_channel
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.v1 import prefill_pb2, prefill_pb2_grpc, session_pb2
from kvrelay.vllm_engine.local_session import LOCAL_GATEWAY_ID

LIVENESS_WINDOW_MS = 3000
"""The prefill worker sends a heartbeat each third of it."""


async def prefilled(
    address: str, command: prefill_pb2.StartPrefill, credentials: ChannelCredentials | None
) -> AsyncIterator[Any]:
    """Yields PrefillDone, and ends when all KV is pushed. Leaving early cancels the prompt.

    Raises:
        TransferError: the prompt or its push failed.
    """
    async with create_channel(address, credentials=credentials) as channel:
        call = prefill_pb2_grpc.PrefillServiceStub(channel).Session()
        try:
            async with asyncio.timeout(None) as silence:
                hello = session_pb2.GatewayHello(
                    gateway_id=LOCAL_GATEWAY_ID,
                    protocol_version=PROTOCOL_VERSION,
                    liveness_window_ms=LIVENESS_WINDOW_MS,
                )
                await call.write(prefill_pb2.PrefillServiceSessionRequest(hello=hello))
                await call.write(prefill_pb2.PrefillServiceSessionRequest(start_prefill=command))
                while True:
                    silence.reschedule(asyncio.get_running_loop().time() + LIVENESS_WINDOW_MS / 1000)
                    response: Any = await call.read()
                    if response is grpc.aio.EOF:
                        raise TransferError("the prefill worker ended the session")
                    match response.WhichOneof("message"):
                        case "heartbeat":
                            ack = session_pb2.HeartbeatAck(number=response.heartbeat.number)
                            await call.write(prefill_pb2.PrefillServiceSessionRequest(heartbeat_ack=ack))
                        case "prefill_done":
                            yield response.prefill_done
                        case "transfer_done":
                            return
                        case "job_failed":
                            raise TransferError(f"the prefill worker failed: {response.job_failed.message}")
        except TimeoutError:
            raise TransferError("the prefill worker was silent") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as failure:
            raise TransferError("the prefill worker cannot be reached") from failure
        finally:
            call.cancel()
