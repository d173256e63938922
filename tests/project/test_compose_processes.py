"""The processes of docker-compose.yml, with its commands, variables and credentials, but without
Docker: what is plain text between them, and who gets in.
"""

import asyncio
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml

from kvrelay.client import AsyncClient
from kvrelay.core.member import Member, MemberRole
from kvrelay.network.rpc import create_channel
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.redis_url import with_password_of, with_tls_of
from kvrelay.testing.waiting import wait_until
from kvrelay.v1 import session_pb2, session_pb2_grpc
from tests.support import left_out
from tests.support.container_processes import ContainerProcesses
from tests.support.tiny_models import make_tiny_model

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
TIMEOUT_S = 240.0
ROLES = ("redis", "gateway", "prefill", "decode", "front", "metrics", "authority")


class Composed(ContainerProcesses):
    """Services on loopback. `secrets` has a folder for each volume of them."""

    def __init__(self, secrets: Path, model: Path) -> None:
        super().__init__()
        self.secrets = secrets
        self.peer_address = "127.0.0.1:1"
        """Of the gateway, for processes."""
        self._model = model

    async def is_healthy(self, name: str, port: int | None = None) -> bool:
        """What the service's healthcheck says, of another port."""
        kind, *command = SERVICES[name]["healthcheck"]["test"]
        command = [self.with_own_port(name, re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", each)) for each in command]
        if kind == "CMD-SHELL":
            command = ["sh", "-c", command[0].replace("redis-cli", f"redis-cli -p {self.redis_port}")]
        elif command[0] == "kvrelay":
            command = [sys.executable, "-m", "kvrelay.cli", *command[1:]]
        process = await asyncio.create_subprocess_exec(
            *command, env=self.environment(name), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        return await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0

    @property
    def redis_url(self) -> str:
        """With the gateway's credentials."""
        variables = self.environment("gateway")
        files = {f"redis_tls_{kind}": variables[f"KVRELAY_REDIS_TLS_{kind.upper()}"] for kind in ("ca", "cert", "key")}
        url = with_tls_of(variables["KVRELAY_REDIS_URL"], files)
        return with_password_of(url, variables["KVRELAY_REDIS_PASSWORD_FILE"])

    def arguments(self, name: str) -> Sequence[str]:
        return [str(each) for each in SERVICES[name]["command"]]

    def variables(self, name: str) -> dict[str, str]:
        given = SERVICES[name].get("environment", {})
        found = {key: self.with_own_port(name, str(value)) for key, value in given.items()}
        return found | ({"KVRELAY_MODEL": str(self._model)} if name in ("prefill", "decode") else {})

    def here(self, name: str, text: str) -> str:
        (own,) = (each.split("-secrets:")[0] for each in SERVICES[name]["volumes"] if each.endswith("/secrets/own:ro"))
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("/secrets/own", str(self.secrets / own))
        text = text.replace("redis.kvrelay.local:6379", f"127.0.0.1:{self.redis_port}")
        return text.replace("gateway:50052", self.peer_address)


def make_credentials(folder: Path) -> None:
    for role in ROLES:
        (folder / role).mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(ROOT / "deploy/compose/make_credentials.py"), str(folder)], check=True)


@pytest.fixture
async def composed(tmp_path: Path) -> Composed:
    if shutil.which("redis-server") is None or shutil.which("redis-cli") is None:
        pytest.skip(left_out.REDIS_SERVER)
    await asyncio.to_thread(make_credentials, tmp_path / "secrets")
    return Composed(tmp_path / "secrets", make_tiny_model("llama", tmp_path / "model"))


async def members_of(composed: Composed) -> dict[MemberRole, Member]:
    async with RedisConnection(composed.redis_url, 20_000) as connection:
        return {member.role: member for member in await MemberRegistry(connection).read_members()}


async def test_redis_gateway_and_workers_speak_tls_and_clients_need_nothing(composed: Composed) -> None:
    async with AsyncExitStack() as running:
        await running.enter_async_context(composed.running("redis"))
        await wait_until(lambda: composed.is_healthy("redis"), "redis's healthcheck", TIMEOUT_S)
        for name in ("gateway", "prefill", "decode"):
            await running.enter_async_context(composed.running(name))
        names = ("gateway", "prefill", "decode")
        try:
            await wait_until(lambda: all(composed.ready(name) for name in names), "all serve", TIMEOUT_S)
        except AssertionError:
            raise AssertionError(composed.output()) from None
        found = await members_of(composed)
        assert found.keys() == {MemberRole.GATEWAY, MemberRole.PREFILL, MemberRole.DECODE}
        await check_health(composed, found)
        await check_client(composed)
        await check_plain_text_is_refused(found)
        await check_metrics(composed)
        composed.peer_address = found[MemberRole.GATEWAY].address
        await running.enter_async_context(composed.running("openai"))
        await check_openai(composed)


async def check_health(composed: Composed, found: dict[MemberRole, Member]) -> None:
    for role, member in found.items():
        port = int(member.address.rpartition(":")[2])
        assert await composed.is_healthy(role.value, port), composed.output()
    assert not await composed.is_healthy("decode", 1)


async def check_client(composed: Composed) -> None:
    """A client without credentials gets an answer, whose KV went from worker to worker."""
    ready = composed.ready("gateway")
    assert ready is not None
    port = ready["address"].rpartition(":")[2]
    async with AsyncClient(f"127.0.0.1:{port}", timeout_s=TIMEOUT_S) as client:
        completion = await client.complete(token_ids=list(range(20, 60)), max_tokens=4, ignore_eos=True)
        assert len(completion.outputs[0].tokens) == 4
        phases = completion.finished.phases
        assert phases.transfer_bytes > 0
        cluster = await client.cluster()
        assert [worker.connected for worker in cluster.workers] == [True, True]


async def check_plain_text_is_refused(found: dict[MemberRole, Member]) -> None:
    for member in found.values():
        channel = create_channel(member.address)
        stub = session_pb2_grpc.ModelServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.GetTokenizer(session_pb2.GetTokenizerRequest(fingerprint="x"), timeout=TIMEOUT_S):
                pass
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await channel.close()


async def check_metrics(composed: Composed) -> None:
    """Prometheus' certificate is asked for by workers, not by the port for users of this machine."""
    own = composed.secrets / "metrics"
    context = ssl.create_default_context(cafile=str(own / "ca.pem"))
    stranger = ssl.create_default_context(cafile=str(own / "ca.pem"))
    context.load_cert_chain(own / "certificate.pem", own / "certificate.key")
    async with aiohttp.ClientSession() as session:
        for name in ("prefill", "decode"):
            ready = composed.ready(name)
            assert ready is not None
            url, server = f"https://127.0.0.1:{ready['http_port']}/metrics", f"{name}.kvrelay.local"
            async with session.get(url, ssl=stranger, server_hostname=server) as answer:
                assert answer.status == 401
            async with session.get(url, ssl=context, server_hostname=server) as answer:
                assert answer.status == 200
                assert "kvrelay_worker_kv_blocks" in await answer.text()
        ready = composed.ready("gateway")
        assert ready is not None
        async with session.get(f"http://127.0.0.1:{ready['http_port']}/metrics") as answer:
            assert answer.status == 200


async def check_openai(composed: Composed) -> None:
    """Over TLS to the gateway's port for processes; for clients in plain text and without a key."""
    try:
        await wait_until(lambda: composed.ready("openai") is not None, "smg has the model", TIMEOUT_S)
    except AssertionError:
        raise AssertionError(composed.output()) from None
    ready = composed.ready("openai")
    assert ready is not None
    url = f"http://127.0.0.1:{ready['address'].rpartition(':')[2]}/v1"
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/models") as answer:
            (model,) = (await answer.json())["data"]
        question = {"model": model["id"], "prompt": "once upon a time", "max_tokens": 4, "temperature": 0}
        async with session.post(f"{url}/completions", json=question) as answer:
            assert answer.status == 200, await answer.text()
            assert (await answer.json())["usage"]["completion_tokens"] == 4
