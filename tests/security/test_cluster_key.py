"""The key by which processes of one cluster prove their roles."""

from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import yaml

from kvrelay.client import AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import (
    DecodeSettings,
    EngineSettings,
    GatewaySettings,
    PrefillSettings,
    RequestSettings,
    ServerSettings,
)
from kvrelay.errors import ConfigError, UnauthenticatedError
from kvrelay.network.rpc import create_channel
from kvrelay.security.cluster_key import NO_PROOF, Challenge, ClusterKey, ClusterKeyFile, read_cluster_key
from kvrelay.security.keys import digest_of, new_key
from kvrelay.security.principal import Role
from kvrelay.v1 import session_pb2, session_pb2_grpc
from tests.support.tiny_models import make_tiny_model

ADDRESS = "127.0.0.1:50051"


class Clock:
    now_ns = 1000

    def __call__(self) -> int:
        return self.now_ns


def key_at(address: str, clock: Clock | None = None) -> ClusterKey:
    """Of a process that listens there."""
    key = ClusterKey(b"k" * 32, clock or Clock())
    key.listens(lambda dialled: dialled == address)
    return key


@pytest.mark.parametrize("role", Role)
def test_a_proof_is_of_its_own_role_and_no_other(role: Role) -> None:
    key = key_at(ADDRESS)
    principal = key.identify(key.proof_of(role, ADDRESS))
    assert principal is not None
    assert (principal.roles, principal.key_id) == (frozenset({role}), f"cluster:{role}")


def test_a_proof_of_another_key_or_for_another_role_proves_nothing() -> None:
    key = key_at(ADDRESS)
    proof = key.proof_of(Role.GATEWAY, ADDRESS)
    assert key.identify(ClusterKey(b"x" * 32, Clock()).proof_of(Role.GATEWAY, ADDRESS)) is None
    assert key.identify(proof.replace("gateway", "operator")) is None
    assert key.identify(proof[:-1]) is None
    assert key.identify("kvrelay-role.gateway.\u00e4") is None
    assert key.identify("kvrelay-role.gateway") is None
    assert key.identify("an API key") is None


@pytest.mark.parametrize("dialled", ["127.0.0.2:50051", "127.0.0.1:50052", "localhost:50051", ""])
def test_a_proof_for_another_address_is_refused(dialled: str) -> None:
    """Who answers there, as a forged registry says, may hand it on."""
    key = key_at(ADDRESS)
    with pytest.raises(UnauthenticatedError, match="for another process"):
        key.identify(key.proof_of(Role.GATEWAY, dialled))


def test_a_proof_from_before_the_process_listened_is_refused() -> None:
    """Another process may have answered at its address then."""
    clock = Clock()
    earlier = ClusterKey(b"k" * 32, clock).proof_of(Role.GATEWAY, ADDRESS)
    with pytest.raises(UnauthenticatedError):
        ClusterKey(b"k" * 32, clock).identify(earlier)
    clock.now_ns += 1
    key = key_at(ADDRESS, clock)
    with pytest.raises(UnauthenticatedError):
        key.identify(earlier)
    assert key.identify(key.proof_of(Role.GATEWAY, ADDRESS)) is not None


def test_a_workers_proof_is_of_its_role_address_key_and_session() -> None:
    worker = key_at(ADDRESS)
    challenge = Challenge(ClusterKey(b"k" * 32), Role.DECODE, ADDRESS)
    proof = worker.prove_worker(Role.DECODE, challenge.nonce, ADDRESS)
    assert challenge.is_met_by(proof)
    assert proof != worker.prove_worker(Role.DECODE, challenge.nonce, ADDRESS)
    assert not challenge.is_met_by(worker.prove_worker(Role.PREFILL, challenge.nonce, ADDRESS))
    assert not challenge.is_met_by(replace(proof, nonce=b"n" * 32))
    assert not challenge.is_met_by(replace(proof, digest=proof.digest[:-1]))
    assert not challenge.is_met_by(NO_PROOF)
    for other in (
        Challenge(ClusterKey(b"k" * 32), Role.DECODE, ADDRESS),
        Challenge(ClusterKey(b"x" * 32), Role.DECODE, ADDRESS),
    ):
        assert not other.is_met_by(proof)
    there = key_at("127.0.0.1:50052").prove_worker(Role.DECODE, challenge.nonce, "127.0.0.1:50052")
    assert not challenge.is_met_by(there)


@pytest.mark.parametrize(
    ("nonce", "dialled"), [(b"n" * 32, "127.0.0.1:50052"), (b"n" * 31, ADDRESS), (b"n" * 33, ADDRESS)]
)
def test_a_worker_proves_nothing_for_another_address_or_a_nonce_of_another_length(nonce: bytes, dialled: str) -> None:
    with pytest.raises(UnauthenticatedError, match="dial this one by the address"):
        key_at(ADDRESS).prove_worker(Role.DECODE, nonce, dialled)


def test_a_gateway_of_an_older_version_gets_no_proof_and_is_served() -> None:
    assert key_at(ADDRESS).prove_worker(Role.DECODE, b"", "") == NO_PROOF


def test_a_written_key_is_for_its_user_alone_and_is_read_again() -> None:
    file = ClusterKeyFile()
    assert file.path is not None
    path = Path(file.path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len(read_cluster_key(file.path)) == 64
    another = ClusterKeyFile()
    assert another.path is not None
    assert read_cluster_key(file.path) != read_cluster_key(another.path)
    another.remove()
    file.remove()
    assert not path.parent.exists()


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("k" * 64)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_cluster_key(str(path))


@pytest.mark.parametrize(("content", "problem"), [("short", "a key of 5 bytes"), ("", "a key of 0 bytes")])
def test_a_short_key_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=problem):
        read_cluster_key(str(path))


def cluster_of(tmp_path: Path, **security: str) -> LocalCluster:
    engine = EngineSettings(model=str(make_tiny_model("llama", tmp_path)), num_threads=1, kv_cache_mib=8)
    return LocalCluster(
        gateway=GatewaySettings(
            server=ServerSettings(port=0),
            requests=RequestSettings(local_prefill_tokens=0),
            security=SecuritySettings.model_validate(security),
        ),
        prefill=[PrefillSettings(engine=engine)],
        decode=[DecodeSettings(engine=engine)],
    )


async def complete(client: AsyncClient) -> int:
    completion = await client.complete(token_ids=list(range(5, 45)), max_tokens=4, ignore_eos=True)
    return len(completion.outputs[0].tokens)


@pytest.mark.timeout(240)
async def test_workers_of_serve_all_answer_only_their_own_processes(tmp_path: Path) -> None:
    """Another user of the machine reaches their ports."""
    cluster = cluster_of(tmp_path)
    async with cluster, AsyncClient(cluster.gateway_address) as client:
        assert await complete(client) == 4
        for worker in (await client.cluster()).workers:
            async with create_channel(worker.address) as channel:
                stub = session_pb2_grpc.ModelServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    async for _ in stub.GetTokenizer(session_pb2.GetTokenizerRequest(), timeout=30):
                        pass
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.timeout(240)
async def test_a_cluster_whose_clients_need_keys_gets_ready_and_serves_them(tmp_path: Path) -> None:
    key = new_key()
    keys_file = tmp_path / "keys.yaml"
    entry = {"id": "alice-1", "sha256": digest_of(key), "tenant": "alice", "roles": ["client"]}
    keys_file.write_text(yaml.safe_dump({"keys": [entry]}))
    async with cluster_of(tmp_path, keys_file=str(keys_file)) as cluster:
        async with AsyncClient(cluster.gateway_address, api_key=key) as client:
            assert await complete(client) == 4
        async with AsyncClient(cluster.gateway_address) as stranger:
            with pytest.raises(UnauthenticatedError):
                await complete(stranger)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-here"):
        read_cluster_key(str(tmp_path / "nothing-here"))
