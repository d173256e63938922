"""Worker processes: in the registry while they live, gone with exit code 0 after a signal, clear
about what stops a start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import decode_worker.main
import prefill_worker.main
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import DecodeSettings, EngineSettings, PrefillSettings, ServerSettings
from kvrelay.core.member import Member
from kvrelay.errors import ConfigError, StartupError
from kvrelay.network.rpc import create_channel
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.v1 import session_pb2, session_pb2_grpc
from kvrelay.worker.process import watch_engine
from tests.support.scripted_gateway import session_with
from tests.support.tiny_models import make_tiny_model
from tests.support.worker_fixtures import TINY_FOLDER, tiny_engine

START_TIMEOUT_S = 60.0
UNGUARDED = ProcessSecurity.of(SecuritySettings(), Role.DECODE)


@asynccontextmanager
async def served(role: str, redis_url: str) -> AsyncIterator[Member]:
    """A worker in this process, from ready to stopped; gives what the registry says of it."""
    server = ServerSettings(redis_url=redis_url, drain_timeout_ms=1000, redis_timeout_ms=5000)
    stop, engine = asyncio.Event(), tiny_engine()
    if role == "decode":
        serving = asyncio.create_task(decode_worker.main.serve(DecodeSettings(server=server), engine, UNGUARDED, stop))
    else:
        serving = asyncio.create_task(
            prefill_worker.main.serve(PrefillSettings(server=server), engine, UNGUARDED, stop)
        )
    async with RedisConnection(redis_url, 5000) as connection:
        registry = MemberRegistry(connection)
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (members := await registry.read_members()):  # noqa: ASYNC110 - in Redis
                await asyncio.sleep(0.02)
        yield members[0]
        stop.set()
        await asyncio.wait_for(serving, 60)
        assert await registry.read_members() == ()


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_worker_is_in_the_registry_serves_and_is_withdrawn_at_its_end(role: str) -> None:
    async with EmbeddedValkey() as valkey, served(role, valkey.url) as member:
        assert (member.role.value, member.model) == (role, "llama")
        async with session_with(role, member.address) as session:
            assert session.hello.worker_id == member.instance_id
            assert session.hello.model.fingerprint == member.fingerprint
        channel = create_channel(member.address)
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        await check_tokenizer(channel, member)
        await channel.close()


async def check_tokenizer(channel: grpc.aio.Channel, member: Member) -> None:
    stub = session_pb2_grpc.ModelServiceStub(channel)
    files: dict[str, bytes] = {}
    async for piece in stub.GetTokenizer(session_pb2.GetTokenizerRequest(fingerprint=member.fingerprint)):
        files[piece.file_name] = files.get(piece.file_name, b"") + piece.content
    folder = TINY_FOLDER / "llama"
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in stub.GetTokenizer(session_pb2.GetTokenizerRequest(fingerprint="another")):
            pass
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_taken_port_is_said_before_anything_is_served() -> None:
    async with EmbeddedValkey() as valkey, served("decode", valkey.url) as member:
        port = int(member.address.rsplit(":", 1)[1])
        settings = DecodeSettings(server=ServerSettings(redis_url=valkey.url, port=port))
        with pytest.raises(StartupError, match="--port"):
            await decode_worker.main.serve(settings, tiny_engine(), UNGUARDED)


def test_a_missing_redis_url_is_said_before_the_model_is_loaded() -> None:
    settings = DecodeSettings(engine=EngineSettings(model="no such model"))
    with pytest.raises(ConfigError, match="redis-url"):
        decode_worker.main.run(settings)


@pytest.mark.parametrize(("role", "number"), [("decode", signal.SIGTERM), ("prefill", signal.SIGINT)])
async def test_a_process_without_redis_is_ready_and_ends_well_after_a_signal(role: str, number: signal.Signals) -> None:
    folder = make_tiny_model("llama", TINY_FOLDER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVRELAY_")}
    environment |= {
        "KVRELAY_MODEL": str(folder),
        "KVRELAY_REDIS_URL": "redis://127.0.0.1:1/0",
        "KVRELAY_KV_CACHE_MIB": "4",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"{role}_worker", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        lines: list[str] = []
        async with asyncio.timeout(START_TIMEOUT_S):
            while not any("ready" in line for line in lines):
                line = await process.stderr.readline()
                assert line, lines
                lines.append(line.decode())
        assert any("--redis-url" in line for line in lines)
        process.send_signal(number)
        _, rest = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, rest
        assert b"Traceback" not in rest
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_process_whose_engine_hangs_is_ended_and_one_whose_steps_end_is_not() -> None:
    turns_s = iter([0.0, 0.04, 0.01, 0.049, 0.0, 1000.0])
    hung = asyncio.Event()
    await watch_engine(lambda: next(turns_s), 0.05, hung.set)
    assert hung.is_set()
    assert list(turns_s) == []
