"""OpenAI's API before gateways with keys, without and with certificates, by real processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
import yaml

from kvrelay.client import TLS, AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster, serve_command
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import OpenAISettings
from kvrelay.config.sources import environment_for
from kvrelay.openai_frontend import readiness
from kvrelay.runtime.child_process import ChildProcess
from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.security.keys import digest_of
from tests.integration.clusters import cluster_of, engine
from tests.support.openai_front import free_ports, sdk_of
from tests.support.tiny_models import make_tiny_model

pytest.importorskip("smg")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

OF_SERVE_ALL, OF_SERVE_OPENAI = ("alice", "bob"), ("carol", "dave")
"""Tenants, and their keys."""
FRONT_KEY = "front"


@pytest_asyncio.fixture(
    params=[False, True], ids=["keys", "keys and certificates"], loop_scope="module", scope="module"
)
async def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    names = (*OF_SERVE_ALL, *OF_SERVE_OPENAI)
    entries: list[dict[str, Any]] = [{"id": name, "tenant": name, "sha256": digest_of(name)} for name in names]
    entries.append({"id": "front-1", "tenant": "own", "roles": ["front"], "sha256": digest_of(FRONT_KEY)})
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    settings = engine(make_tiny_model("llama", folder))
    cluster = cluster_of([settings], [settings])
    security = SecuritySettings(keys_file=str(folder / "keys.yaml"), audit_log=str(folder / "audit.jsonl"))
    cluster.gateway = cluster.gateway.model_copy(update={"security": security})
    cluster.openai = OpenAISettings(port=0, security=security)
    if request.param:
        make_certificates(folder / "tls", CertificatePlan("kvrelay.local"))
        cluster.tls_folder = str(folder / "tls")
    async with cluster:
        yield cluster


def audit_of(cluster: LocalCluster) -> str:
    return Path(cluster.gateway.security.audit_log or "").read_text()


def ca_of(cluster: LocalCluster) -> str | None:
    return None if cluster.tls_folder is None else str(Path(cluster.tls_folder) / "ca.pem")


@asynccontextmanager
async def front_beside(cluster: LocalCluster, *arguments: str) -> AsyncIterator[str]:
    """A process of `serve openai`; its host:port."""
    (port,) = free_ports(1)
    flags = ("--port", str(port), "--keys-file", cluster.gateway.security.keys_file or "", *arguments)
    lines: list[str] = []
    environment = environment_for(OpenAISettings())
    process = ChildProcess(
        "front", [*serve_command("openai"), *flags], environment, lambda name, line: lines.append(line)
    )
    await process.start()
    try:
        ready = asyncio.create_task(readiness.wait_for_front(f"127.0.0.1:{port}", ca_of(cluster)))
        ended = asyncio.create_task(process.wait())
        await asyncio.wait([ready, ended], timeout=120, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        assert ready.done(), lines
        yield f"127.0.0.1:{port}"
    finally:
        await process.stop(10.0)


async def assert_each_key_is_a_tenant(cluster: LocalCluster, front: str | None, names: tuple[str, ...]) -> None:
    ca = ca_of(cluster)
    tls, url = None if ca is None else TLS(ca=ca), f"{'http' if ca is None else 'https'}://{front}"
    messages: Any = [{"role": "user", "content": "hello"}]
    async with sdk_of(url, names[0], ca) as sdk:
        (model,) = [model.id async for model in sdk.models.list()]
    async with sdk_of(url, "mallory", ca) as sdk:
        with pytest.raises(openai.AuthenticationError):
            await sdk.chat.completions.create(model=model, messages=messages, max_tokens=4)
    for name in names:
        async with sdk_of(url, name, ca) as sdk:
            answer = await sdk.chat.completions.create(model=model, messages=messages, max_tokens=4, temperature=0)
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 0
        async with AsyncClient(cluster.gateway_address, api_key=name, tls=tls) as client:
            (request,) = (await client.list_requests()).requests
            assert request.tenant == name


async def test_each_key_is_a_tenant_over_openais_api_as_over_our_own(cluster: LocalCluster) -> None:
    await assert_each_key_is_a_tenant(cluster, cluster.openai_address, OF_SERVE_ALL)
    assert "POST /v1/chat/completions" in audit_of(cluster)


async def test_a_front_of_its_own_proves_its_role_as_the_gateway_asks(cluster: LocalCluster, tmp_path: Path) -> None:
    """By a key, or by a certificate at the gateway's --peer-port."""
    if cluster.tls_folder is None:
        (tmp_path / "front.key").write_text(FRONT_KEY)
        proof = ("--gateway", cluster.gateway_address, "--gateway-key-file", str(tmp_path / "front.key"))
    else:
        (gateway,) = cluster._asked_addresses
        assert gateway != cluster.gateway_address, "that of --peer-port"
        proof = ("--gateway", gateway, "--tls-folder", cluster.tls_folder)
    async with front_beside(cluster, *proof) as front:
        await assert_each_key_is_a_tenant(cluster, front, OF_SERVE_OPENAI)
