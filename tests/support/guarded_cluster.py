"""Two gateways that ask every caller for a key, over fake workers and a real Valkey."""

import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

import gateway.main
import gateway.state.failure_detector
import gateway.state.other_gateways
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.network import rpc
from kvrelay.network.bearer_channel import BearerChannel
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.security.guard import Guard
from kvrelay.security.method_rules import GRPC_RULES
from kvrelay.security.principal import Principal, Role
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.vllm_engine.messages import engine_grpc
from tests.gateway.conftest import LEASE_MS, Gateway, eventually, running_gateway
from tests.support.fake_workers import MODEL, FakeCluster, FakeDecodeWorker, HeldJob
from tests.support.small_tokenizer import tokenizer_files

BLOCK_SIZE = 16

OPERATOR, GATEWAY = "operator", "gateway"
Metadata = tuple[tuple[str, str], ...]


def as_caller(key: str) -> Metadata:
    """The metadata of a call with this key."""
    return (("authorization", f"Bearer {key}"),)


class Keys:
    """Every tenant's name is its key; each tenant is a front too, so that it may use VllmEngine."""

    def __init__(self, tenants: Sequence[str]) -> None:
        clients = frozenset({Role.CLIENT, Role.FRONT})
        self.principals = {tenant: Principal(clients, tenant, tenant, proof=tenant) for tenant in tenants}
        self.principals[OPERATOR] = Principal(frozenset({Role.OPERATOR}), None, OPERATOR, proof=OPERATOR)
        # Between gateways it is a certificate.
        self.principals[GATEWAY] = Principal(frozenset({Role.GATEWAY}), None, GATEWAY, proof=GATEWAY)

    def identify(self, token: str) -> Principal | None:
        return self.principals.get(token)

    @property
    def live_proofs(self) -> frozenset[str]:
        return frozenset(principal.proof for principal in self.principals.values())


class CachingDecodeWorker(FakeDecodeWorker):
    """Finds prompts' beginnings as a real decode worker does, and tells how much it found."""

    def __init__(self, cluster: FakeCluster) -> None:
        super().__init__(cluster, MODEL, tokenizer_files())
        self.blocks = BlockManager(4096, BLOCK_SIZE)
        self.salts: set[str] = set()

    async def _reserve(self, held_job: HeldJob) -> None:
        job = held_job.job
        self.salts.add(job.cache_salt)
        table = self.blocks.allocate(job.token_ids, job.cache_salt)
        self.num_cached_tokens = table.num_cached_tokens
        self.blocks.commit(table, job.token_ids, len(job.token_ids))
        self.blocks.release(table)
        await super()._reserve(held_job)


@dataclass
class GuardedCluster:
    gateways: list[Gateway]
    decode: CachingDecodeWorker
    workers: FakeCluster
    valkey: EmbeddedValkey

    def engine(self, number: int = 0) -> Any:
        """VllmEngine of a gateway."""
        return engine_grpc.VllmEngineStub(self.gateways[number].channel)


@asynccontextmanager
async def guarded_cluster(
    patch: pytest.MonkeyPatch, keys: Keys, num_gateways: int = 2, **requests: Any
) -> AsyncIterator[GuardedCluster]:
    """`requests` are settings of the gateways."""
    guard = Guard(GRPC_RULES[Role.GATEWAY], [keys], lambda auth_context: frozenset())

    def create_server(**options: Any) -> grpc.aio.Server:
        return rpc.create_server(**(options | {"guard": guard}))

    patch.setattr(gateway.main, "create_server", create_server)
    for module in (gateway.state.other_gateways, gateway.state.failure_detector):
        patch.setattr(module, "create_channel", _channel_of_a_gateway)
    workers = FakeCluster()
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(EmbeddedValkey())
        connection = await stack.enter_async_context(RedisConnection(valkey.url, timeout_ms=20_000))
        stack.push_async_callback(workers.stop)
        prefill, decode = await workers.add_prefill(), CachingDecodeWorker(workers)
        await decode.start()
        workers.workers.append(decode)
        registry = MemberRegistry(connection, LEASE_MS)
        for worker in (prefill, decode):
            await stack.enter_async_context(registry.lease(worker.member))
        gateways = [
            await stack.enter_async_context(running_gateway(valkey.url, **requests)) for _ in range(num_gateways)
        ]
        for each in gateways:
            await eventually(functools.partial(_is_connected, each, num_gateways))
        yield GuardedCluster(gateways, decode, workers, valkey)


async def _is_connected(asked: Gateway, num_gateways: int) -> bool:
    cluster = await asked.stub.GetCluster(pb.GetClusterRequest(), metadata=as_caller(OPERATOR))
    return sum(worker.connected for worker in cluster.workers) == 2 and len(cluster.gateways) == num_gateways


def _channel_of_a_gateway(address: str, *, credentials: ChannelCredentials | None = None) -> grpc.aio.Channel:
    return BearerChannel(grpc.aio.insecure_channel(address), lambda: GATEWAY)
