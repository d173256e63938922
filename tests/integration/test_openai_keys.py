"""`serve all` with keys and OpenAI's API, without and with certificates."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from kvrelay.client import TLS, AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import OpenAISettings
from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.security.keys import digest_of
from tests.integration.clusters import cluster_of, engine
from tests.support.openai_front import sdk_of
from tests.support.tiny_models import make_tiny_model

pytest.importorskip("smg")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NAMES = ("alice", "bob")


@pytest.fixture(params=[False, True], ids=["keys", "keys and certificates"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LocalCluster]:
    entries = [{"id": name, "tenant": name, "sha256": digest_of(name)} for name in NAMES]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    settings = engine(make_tiny_model("llama", tmp_path))
    cluster = cluster_of([settings], [settings])
    security = SecuritySettings(keys_file=str(tmp_path / "keys.yaml"), audit_log=str(tmp_path / "audit.jsonl"))
    cluster.gateway = cluster.gateway.model_copy(update={"security": security})
    cluster.openai = OpenAISettings(port=0, security=security)
    if request.param:
        make_certificates(tmp_path / "tls", CertificatePlan("kvrelay.local"))
        cluster.tls_folder = str(tmp_path / "tls")
    async with cluster:
        yield cluster


async def test_each_key_is_a_tenant_over_openais_api_as_over_our_own(cluster: LocalCluster) -> None:
    ca = None if cluster.tls_folder is None else str(Path(cluster.tls_folder) / "ca.pem")
    tls, url = None if ca is None else TLS(ca=ca), f"{'http' if ca is None else 'https'}://{cluster.openai_address}"
    messages: Any = [{"role": "user", "content": "hello"}]
    async with sdk_of(url, NAMES[0], ca) as sdk:
        (model,) = [model.id async for model in sdk.models.list()]
    async with sdk_of(url, "mallory", ca) as sdk:
        with pytest.raises(openai.AuthenticationError):
            await sdk.chat.completions.create(model=model, messages=messages, max_tokens=4)
    for name in NAMES:
        async with sdk_of(url, name, ca) as sdk:
            answer = await sdk.chat.completions.create(model=model, messages=messages, max_tokens=4, temperature=0)
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 0
        async with AsyncClient(cluster.gateway_address, api_key=name, tls=tls) as client:
            (request,) = (await client.list_requests()).requests
            assert request.tenant == name
    assert "POST /v1/chat/completions" in audit_of(cluster)


def audit_of(cluster: LocalCluster) -> str:
    return Path(cluster.gateway.security.audit_log or "").read_text()
