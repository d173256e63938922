"""Two gateways with keys over one Valkey: a key's limit holds for both together."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from gateway.requests import shared_usage
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.errors import QuotaError
from kvrelay.security.keys import digest_of
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.wire.errors import error_of_rpc
from tests.gateway.conftest import (
    Answer,
    Bench,
    Gateway,
    eventually,
    read_all,
    read_into,
    running_gateway,
    token_request,
)
from tests.support.fake_workers import FakeDecodeWorker
from tests.support.redis_fixtures import stopped

PROMPT = list(range(10, 50))
LIMIT = 2


def as_key(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {name}"),)


def keys_file(folder: Path) -> str:
    limited: dict[str, Any] = {"id": "alice-1", "tenant": "alice", "limits": {"running_requests": LIMIT}}
    operator: dict[str, Any] = {"id": "operator-1", "roles": ["operator"], "tenant": "operators"}
    entries = [limited | {"sha256": digest_of("alice")}, operator | {"sha256": digest_of("operator")}]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    return str(folder / "keys.yaml")


@pytest.fixture
async def decode(bench: Bench) -> FakeDecodeWorker:
    worker = await bench.workers.add_decode()
    await bench.announce(worker)
    worker.hold("token:5")
    return worker


@pytest.fixture
async def gateways(bench: Bench, decode: FakeDecodeWorker, tmp_path: Path) -> AsyncIterator[list[Gateway]]:
    sections = {"security": SecuritySettings(keys_file=keys_file(tmp_path))}
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(
                running_gateway(bench.valkey.url, sections=sections, local_prefill_tokens=1000)
            )
            for _ in range(2)
        ]
        for gateway in started:
            await eventually(lambda gateway=gateway: is_connected(gateway))  # type: ignore[misc]
        yield started


async def is_connected(gateway: Gateway) -> bool:
    cluster = await gateway.stub.GetCluster(pb.GetClusterRequest(), metadata=as_key("operator"))
    return any(worker.connected for worker in cluster.workers)


async def begun(gateway: Gateway) -> Any:
    call = gateway.stub.Generate(token_request(PROMPT, 10), metadata=as_key("alice"))
    await read_into(Answer(), call, until=5)
    return call


async def is_refused(gateway: Gateway) -> bool:
    call = gateway.stub.Generate(token_request(PROMPT, 2), metadata=as_key("alice"))
    try:
        await read_all(call)
    except grpc.aio.AioRpcError as failure:
        if isinstance(error_of_rpc(failure), QuotaError):
            return True
        raise
    return False


async def is_admitted(gateway: Gateway) -> bool:
    return not await is_refused(gateway)


async def test_a_keys_limit_holds_for_all_gateways_together(gateways: list[Gateway], decode: FakeDecodeWorker) -> None:
    one, other = gateways
    assert await is_admitted(other)
    calls = [await begun(one) for _ in range(LIMIT)]
    await eventually(lambda: is_refused(other))
    assert await is_refused(one)
    calls[0].cancel()
    await eventually(lambda: is_admitted(other))
    await eventually(lambda: is_admitted(one))
    calls[1].cancel()
    decode.release("token:5")


async def test_a_gateway_counts_for_itself_while_redis_is_away(
    bench: Bench, gateways: list[Gateway], decode: FakeDecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_usage, "REPORT_LIFETIME_S", 1.0)
    one, other = gateways
    calls = [await begun(one) for _ in range(LIMIT)]
    await eventually(lambda: is_refused(other))
    with stopped(bench.valkey):
        await eventually(lambda: is_admitted(other))
        assert await is_refused(one), "its own still count"
    await eventually(lambda: is_refused(other))
    for call in calls:
        call.cancel()
    decode.release("token:5")


async def test_a_stopped_gateways_requests_count_no_longer(
    gateways: list[Gateway], decode: FakeDecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_usage, "REPORT_LIFETIME_S", 1.0)
    one, other = gateways
    for _ in range(LIMIT):
        await begun(one)
    await eventually(lambda: is_refused(other))
    await one.stop_at_once()
    await eventually(lambda: is_admitted(other))
    decode.release("token:5")
