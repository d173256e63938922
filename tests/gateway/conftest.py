"""Gateways over fake workers and a real Valkey, in the test's own event loop."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
import redis.asyncio

from gateway.main import serve
from kvrelay.config.settings import GatewaySettings, RequestSettings, ServerSettings
from kvrelay.network.rpc import create_channel
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc, session_pb2
from tests.support.fake_workers import FakeCluster, FakeWorker

LEASE_MS = 3000
REDIS_TIMEOUT_MS = 2000
BOUND_S = 30.0


class Gateway:
    """A running gateway and its client."""

    def __init__(
        self, address: str, channel: grpc.aio.Channel, stop: asyncio.Event, task: "asyncio.Task[None]"
    ) -> None:
        self.address = address
        self.http_url = ""
        """Empty without an HTTP port."""
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.channel = channel
        self.task = task
        self._stop = stop

    async def stop(self) -> None:
        """As SIGTERM would."""
        self._stop.set()
        async with asyncio.timeout(BOUND_S):
            await self.task

    async def stop_at_once(self) -> None:
        """Does not wait for running requests."""
        self.task.cancel()
        await asyncio.wait([self.task])


class Bench:
    """The workers, gateways and store of a test."""

    def __init__(self, valkey: EmbeddedValkey, registry: MemberRegistry, stack: AsyncExitStack) -> None:
        self.workers = FakeCluster()
        self.valkey = valkey
        self._registry = registry
        self._stack = stack
        self._leases: dict[str, AsyncExitStack] = {}
        self._gateways: list[Gateway] = []

    async def announce(self, *workers: FakeWorker) -> None:
        """Gives workers a lease."""
        for worker in workers:
            self._leases[worker.worker_id] = lease = AsyncExitStack()
            await lease.enter_async_context(self._registry.lease(worker.member))
            self._stack.push_async_exit(lease)

    async def kill(self, worker: FakeWorker) -> None:
        """Breaks the worker's streams and removes its lease; waits until every gateway has noticed."""
        await worker.kill()
        await self._leases.pop(worker.worker_id).aclose()

        async def noticed() -> bool:
            answering = [gateway for gateway in self._gateways if not gateway.task.done()]
            clusters = [await gateway.stub.GetCluster(pb.GetClusterRequest()) for gateway in answering]
            return not any(
                known.connected and known.worker_id == worker.worker_id
                for cluster in clusters
                for known in cluster.workers
            )

        await eventually(noticed)

    async def gateway(self, num_workers: int | None = None, **requests: Any) -> Gateway:
        """Returns a gateway connected to `num_workers`, by default all."""
        gateway = await self._stack.enter_async_context(running_gateway(self.valkey.url, **requests))
        self._gateways.append(gateway)
        wanted = len(self.workers.workers) if num_workers is None else num_workers

        async def connected() -> bool:
            cluster = await gateway.stub.GetCluster(pb.GetClusterRequest())
            return sum(worker.connected for worker in cluster.workers) >= wanted

        await eventually(connected)
        return gateway

    async def flush_store(self) -> None:
        """Redis loses everything."""
        async with redis.asyncio.Redis.from_url(self.valkey.url) as client:
            await client.flushall()

    async def limit_store(self, max_memory: str) -> None:
        """Bounds Redis' memory; 0 is no limit."""
        async with redis.asyncio.Redis.from_url(self.valkey.url) as client:
            await client.config_set("maxmemory", max_memory)

    async def at_rest(self) -> None:
        """Waits until no worker holds anything."""

        async def nothing_held() -> bool:
            return not self.workers.held()

        await eventually(nothing_held)


@asynccontextmanager
async def running_gateway(
    redis_url: str, *, http: bool = False, sections: dict[str, Any] | None = None, **requests: Any
) -> AsyncIterator[Gateway]:
    """`sections`: settings besides those of the server and of requests."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as free_for_http:
        port, http_port = free.getsockname()[1], free_for_http.getsockname()[1]
    settings = GatewaySettings(
        server=ServerSettings(
            port=port,
            http_port=http_port if http else None,
            redis_url=redis_url,
            lease_ms=LEASE_MS,
            drain_timeout_ms=5000,
            redis_timeout_ms=REDIS_TIMEOUT_MS,
            log_level="error",
        ),
        requests=RequestSettings.model_validate({"local_prefill_tokens": 0, "worker_wait_ms": 5000} | requests),
        **sections or {},
    )
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop))
    try:
        async with create_channel(f"127.0.0.1:{port}") as channel:
            gateway = Gateway(f"127.0.0.1:{port}", channel, stop, task)
            gateway.http_url = f"http://127.0.0.1:{http_port}" if http else ""
            ready = asyncio.create_task(channel.channel_ready())
            async with asyncio.timeout(BOUND_S):
                await asyncio.wait([ready, task], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                ready.cancel()
                task.result()
            yield gateway
            if not task.done():
                await gateway.stop()
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with (
        EmbeddedValkey() as valkey,
        RedisConnection(valkey.url, timeout_ms=20_000) as connection,
        AsyncExitStack() as stack,
    ):
        bench = Bench(valkey, MemberRegistry(connection, LEASE_MS), stack)
        stack.push_async_callback(bench.workers.stop)
        yield bench


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = BOUND_S) -> None:
    """Polls until the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                if await condition():
                    return
            await asyncio.sleep(0.01)


def token_request(prompt: list[int], max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    """A greedy request with a prompt of token ids; `sampling_...` values are sampling fields."""
    sampling = {
        name.removeprefix("sampling_"): fields.pop(name) for name in list(fields) if name.startswith("sampling_")
    }
    params = session_pb2.SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | sampling)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=params, **fields)


class Answer:
    """A stream's messages, checked as they come: Accepted, each index once and in order, one
    Finished.
    """

    def __init__(self) -> None:
        self.accepted: pb.Accepted | None = None
        self.finished: pb.Finished | None = None
        self.token_ids: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.reasons: dict[int, int] = {}
        self.num_messages = 0

    def add(self, frame: Any, from_index: int = 0) -> None:
        assert self.finished is None, "nothing follows Finished"
        kind = frame.WhichOneof("event")
        if kind == "accepted":
            assert self.accepted is None
            self.accepted = frame.accepted
        elif kind == "finished":
            self.finished = frame.finished
        else:
            assert self.accepted is not None, "Accepted comes first"
            delta = frame.delta
            ids = self.token_ids.setdefault(delta.sequence, [])
            assert delta.index == len(ids) + from_index, "I1"
            assert delta.sequence not in self.reasons, "nothing follows a sequence's end"
            ids.extend(token.token_id for token in delta.tokens)
            self.texts[delta.sequence] = self.texts.get(delta.sequence, "") + delta.text
            if delta.finish_reason:
                self.reasons[delta.sequence] = delta.finish_reason
            self.num_messages += 1


async def read_all(call: Any, from_index: int = 0) -> Answer:
    """Raises the stream's error status."""
    answer = Answer()
    await read_into(answer, call, from_index)
    assert answer.finished is not None, "OK means finished"
    return answer


async def read_into(answer: Answer, call: Any, from_index: int = 0, until: int | None = None) -> None:
    """Reads until the end or until there are `num_tokens`. Raises the stream's error status."""
    async with asyncio.timeout(BOUND_S):
        async for frame in call:
            answer.add(frame, from_index)
            if until is not None and sum(map(len, answer.token_ids.values())) >= until:
                return
