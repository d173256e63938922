"""A gateway with certificates whose clients are users of its machine: one port needs nothing, the
other a certificate.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvrelay.client import AsyncClient
from kvrelay.config.security_settings import PeerSettings, SecuritySettings
from kvrelay.errors import ConfigError, UnavailableError
from kvrelay.network.rpc import bind_port, bind_server, create_channel, create_server
from kvrelay.security import certificates
from kvrelay.security.certificates import CertificatePlan
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.security.principal import LOCAL, Role, current_principal
from kvrelay.security.process_security import ProcessSecurity
from tests.integration.clusters import cluster_of, engine, random_prompt
from tests.support.tiny_models import make_tiny_model

PLAN = CertificatePlan("kvrelay.local")
TIMEOUT_S = 20.0
GENERATE = "/kvrelay.v1.InferenceService/Generate"
CANCEL = "/kvrelay.v1.InferenceService/CancelRequest"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.make_certificates(tmp_path / "certificates", PLAN)
    return tmp_path / "certificates"


def settings_of(folder: Path, role: str, **changes: Any) -> SecuritySettings:
    files = {"tls_cert": f"{role}.pem", "tls_key": f"{role}.key", "tls_ca": "ca.pem"}
    return SecuritySettings(**{name: str(folder / file) for name, file in files.items()}, **changes)


@asynccontextmanager
async def gateway(folder: Path) -> AsyncIterator[tuple[str, str, list[Any]]]:
    """A server with a gateway's guard: address for clients, for processes, and callers."""
    security = ProcessSecurity.of(settings_of(folder, "gateway"), Role.GATEWAY, local_clients=True)
    callers: list[Any] = []

    async def answer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        callers.append(current_principal())
        return b""

    server = create_server(guard=security.guard)
    for path in (GENERATE, CANCEL):
        _, service, method = path.split("/")
        handlers: dict[str, Any] = {method: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    bound = bind_server(server, "127.0.0.1", 0, (), security.server_credentials())
    peer_port = bind_port(server, "127.0.0.1", 0, "--peer-port", security.peer_credentials())
    await server.start()
    try:
        yield f"127.0.0.1:{bound.port}", f"127.0.0.1:{peer_port}", callers
    finally:
        await server.stop(None)


async def ask(address: str, method: str, credentials: ChannelCredentials | None = None) -> grpc.StatusCode:
    async with create_channel(address, credentials=credentials) as channel:
        call: Any = channel.unary_unary(method)
        try:
            await call(b"", timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            return failure.code()
    return grpc.StatusCode.OK


def certified(folder: Path, role: str) -> ChannelCredentials:
    pair = ((folder / f"{role}.key").read_bytes(), (folder / f"{role}.pem").read_bytes())
    tls = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *pair)
    return ChannelCredentials(tls, "gateway.kvrelay.local", b"")


async def test_clients_need_nothing_at_their_port_and_are_local(folder: Path) -> None:
    async with gateway(folder) as (clients, _, callers):
        assert await ask(clients, GENERATE) is grpc.StatusCode.OK
        assert callers == [LOCAL]
        assert await ask(clients, GENERATE, certified(folder, "gateway")) is grpc.StatusCode.UNAVAILABLE  # no TLS


async def test_processes_have_the_rights_of_their_certificate_at_theirs(folder: Path) -> None:
    async with gateway(folder) as (_, peers, callers):
        assert await ask(peers, GENERATE) is grpc.StatusCode.UNAVAILABLE
        assert await ask(peers, CANCEL, certified(folder, "gateway")) is grpc.StatusCode.OK
        assert [caller.roles for caller in callers] == [{Role.GATEWAY}]
        assert await ask(peers, GENERATE, certified(folder, "gateway")) is grpc.StatusCode.PERMISSION_DENIED
        # A certificate of the CA that proves no role of a process.
        assert await ask(peers, CANCEL, certified(folder, "redis")) is grpc.StatusCode.UNAUTHENTICATED
        assert len(callers) == 1


def test_it_needs_certificates_and_no_keys(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--local-clients needs certificates"):
        ProcessSecurity.of(SecuritySettings(), Role.GATEWAY, local_clients=True)
    (folder / "keys.yaml").write_text("keys: []\n")
    settings = settings_of(folder, "gateway", keys_file=str(folder / "keys.yaml"))
    with pytest.raises(ConfigError, match=r"--local-clients lets clients in without a key"):
        ProcessSecurity.of(settings, Role.GATEWAY, local_clients=True)


def test_http_asks_for_nothing_either(folder: Path) -> None:
    settings = settings_of(folder, "gateway")
    assert ProcessSecurity.of(settings, Role.GATEWAY).http_guard is not None
    assert ProcessSecurity.of(settings, Role.GATEWAY, local_clients=True).http_guard is None


@pytest.mark.integration
async def test_a_cluster_answers_a_client_without_credentials_through_workers_with_certificates(
    folder: Path, tmp_path: Path
) -> None:
    settings = engine(make_tiny_model("llama", tmp_path / "model"))
    cluster = cluster_of([settings], [settings], local_prefill_tokens=0)
    cluster.tls_folder = str(folder)
    cluster.gateway = cluster.gateway.model_copy(update={"peers": PeerSettings(local_clients=True)})
    async with cluster, AsyncClient(cluster.gateway_address, timeout_s=240) as client:
        completion = await client.complete(token_ids=random_prompt(1, 40), max_tokens=4, ignore_eos=True)
        assert len(completion.outputs[0].tokens) == 4
        assert completion.finished.phases.transfer_bytes > 0
        for worker in (await client.cluster()).workers:
            async with AsyncClient(worker.address, timeout_s=TIMEOUT_S) as stranger:
                with pytest.raises(UnavailableError):
                    await stranger.health()
