"""A process takes changed keys over while it serves: withdrawn ones end, new ones count."""

import asyncio
import dataclasses
import datetime
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from kvrelay.config.security_settings import SecuritySettings
from kvrelay.errors import ConfigError, UnauthenticatedError
from kvrelay.network import rpc
from kvrelay.observability.metrics.security_metrics import CALLS_REFUSED, security_samples
from kvrelay.security.certificate_files import CertificateFiles
from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.security.keys import digest_of
from kvrelay.security.principal import Role
from kvrelay.security.process_security import POLL_INTERVAL_S, ProcessSecurity
from kvrelay.security.reloaded_file import ReloadedFile
from kvrelay.testing.waiting import wait_until
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc
from kvrelay.wire.errors import error_of_rpc

WITHDRAWN_WITHIN_S = 3.0


class Endless(inference_pb2_grpc.InferenceServiceServicer):
    async def Resume(self, request: pb.ResumeRequest, context: object) -> AsyncIterator[pb.ResumeResponse]:
        yield pb.ResumeResponse()
        await asyncio.Event().wait()

    async def GetRequest(self, request: pb.GetRequestRequest, context: object) -> pb.GetRequestResponse:
        return pb.GetRequestResponse()


class Keys:
    """A keys file whose keys are named as their tenants."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *names: str) -> None:
        entries = [{"id": name, "sha256": digest_of(name), "tenant": name} for name in names]
        self.path.write_text(yaml.safe_dump({"keys": entries}))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys(tmp_path / "keys.yaml")
    keys.write("alice", "bob")
    return keys


@pytest.fixture
def security(keys: Keys) -> ProcessSecurity:
    return ProcessSecurity.of(SecuritySettings(keys_file=str(keys.path)), Role.GATEWAY)


@pytest.fixture
async def stub(security: ProcessSecurity) -> AsyncIterator["inference_pb2_grpc.InferenceServiceAsyncStub"]:
    server = rpc.create_server(guard=security.guard)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Endless(), server)  # type: ignore[abstract]
    bound = rpc.bind_server(server, "127.0.0.1", 0, ["kvrelay.v1.InferenceService"])
    await server.start()
    async with security.watching(), rpc.create_channel(f"127.0.0.1:{bound.port}") as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)
    await server.stop(None)


def as_(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {name}"),)


async def test_a_withdrawn_key_is_refused_and_its_streams_end_while_others_go_on(
    keys: Keys, stub: "inference_pb2_grpc.InferenceServiceAsyncStub"
) -> None:
    of_alice = stub.Resume(pb.ResumeRequest(), metadata=as_("alice"))
    of_bob = stub.Resume(pb.ResumeRequest(), metadata=as_("bob"))
    await of_alice.read()
    await of_bob.read()
    keys.write("bob", "carol")
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await of_alice.read()
    assert isinstance(error_of_rpc(ended.value), UnauthenticatedError)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetRequest(pb.GetRequestRequest(), metadata=as_("alice"))
    assert isinstance(error_of_rpc(refused.value), UnauthenticatedError)
    await stub.GetRequest(pb.GetRequestRequest(), metadata=as_("carol"))
    assert not of_bob.done()
    of_bob.cancel()


async def test_a_withdrawal_needs_so_few_polls_that_it_counts_within_three_seconds(
    keys: Keys, stub: "inference_pb2_grpc.InferenceServiceAsyncStub", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in looks at the file, since a busy machine is late by any clock."""
    num_polls, poll = 0, ReloadedFile.poll

    def counted(file: ReloadedFile[Any]) -> bool:
        nonlocal num_polls
        num_polls += 1
        return poll(file)

    of_alice = stub.Resume(pb.ResumeRequest(), metadata=as_("alice"))
    await of_alice.read()
    monkeypatch.setattr(ReloadedFile, "poll", counted)
    new = keys.path.with_name("new.yaml")
    Keys(new).write("bob")
    new.replace(keys.path)
    with pytest.raises(grpc.aio.AioRpcError):
        await of_alice.read()
    # The first may have been under way when the file was replaced.
    assert num_polls in (2, 3)
    assert (num_polls + 1) * POLL_INTERVAL_S < WITHDRAWN_WITHIN_S


async def test_a_broken_file_ends_nothing_and_is_a_problem(
    keys: Keys, security: ProcessSecurity, stub: "inference_pb2_grpc.InferenceServiceAsyncStub"
) -> None:
    assert not security.problems
    keys.path.write_text("keys: [")
    await wait_until(lambda: bool(security.problems), "the broken file is noticed")
    await stub.GetRequest(pb.GetRequestRequest(), metadata=as_("alice"))
    assert "alice" not in security.problems[0]
    samples = {sample.family.name: sample.value for sample in security_samples(security)}
    assert samples["kvrelay_credential_problems"] == 1


def exchanged(path: str, content: bytes) -> bytes:
    before = Path(path).read_bytes()
    Path(path).write_bytes(content)
    return before


async def test_broken_certificates_are_a_problem_until_they_are_mended(keys: Keys, tmp_path: Path) -> None:
    make_certificates(tmp_path / "certificates", CertificatePlan("kvrelay.local"))
    files = {"tls_cert": "gateway.pem", "tls_key": "gateway.key", "tls_ca": "ca.pem"}
    paths = {name: str(tmp_path / "certificates" / file) for name, file in files.items()}
    security = ProcessSecurity.of(SecuritySettings(keys_file=str(keys.path), **paths), Role.GATEWAY)
    assert security.health_notes(None) == {}
    async with security.watching():
        before = exchanged(paths["tls_key"], b"no key")
        keys.path.write_text("keys: [")
        await wait_until(lambda: len(security.problems) == 2, "both broken files are noticed")
        notes = security.health_notes("danger")
        assert notes == {"insecure": True, "credential_problems": ["keys file", "certificates"]}
        assert str(tmp_path) not in str(notes), "strangers read it"
        exchanged(paths["tls_key"], before)
        keys.write("alice")
        await wait_until(lambda: not security.problems, "both are mended")


def test_a_certificate_that_expires_in_use_is_a_problem(tmp_path: Path) -> None:
    make_certificates(tmp_path, CertificatePlan("kvrelay.local"))
    files = CertificateFiles(*(str(tmp_path / name) for name in ("decode.pem", "decode.key", "ca.pem")))
    assert files.problem is None
    assert files.current().expires is not None
    files._current = dataclasses.replace(files.current(), expires=datetime.datetime.now(datetime.UTC))
    assert "has expired" in (files.problem or "")


async def test_refused_calls_are_counted_by_reason(
    security: ProcessSecurity, stub: "inference_pb2_grpc.InferenceServiceAsyncStub"
) -> None:
    for metadata in (None, as_("mallory")):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetRequest(pb.GetRequestRequest(), metadata=metadata)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GetCluster(pb.GetClusterRequest(), metadata=as_("alice"))
    refused = {sample.labels: sample.value for sample in security_samples(security) if sample.family is CALLS_REFUSED}
    assert refused == {("UNAUTHENTICATED",): 2, ("ACCESS_DENIED",): 1}


def test_without_credentials_there_is_no_guard() -> None:
    for role in (Role.GATEWAY, Role.PREFILL, Role.DECODE):
        assert ProcessSecurity.of(SecuritySettings(), role).guard is None


def test_workers_are_guarded_by_certificates_only(keys: Keys, tmp_path: Path) -> None:
    with_keys = SecuritySettings(keys_file=str(keys.path))
    assert ProcessSecurity.of(with_keys, Role.DECODE).guard is None
    make_certificates(tmp_path, CertificatePlan("kvrelay.local"))
    for role in (Role.GATEWAY, Role.PREFILL, Role.DECODE):
        files = {"tls_cert": f"{role}.pem", "tls_key": f"{role}.key", "tls_ca": "ca.pem"}
        settings = SecuritySettings(**{name: str(tmp_path / file) for name, file in files.items()})
        assert ProcessSecurity.of(settings, role).guard is not None


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.PREFILL, Role.DECODE, Role.FRONT])
def test_a_folder_of_certificates_gives_each_role_its_own(role: Role, tmp_path: Path) -> None:
    make_certificates(tmp_path, CertificatePlan("kvrelay.local"))
    settings = SecuritySettings(tls_folder=str(tmp_path))
    assert settings.has_client_credentials
    credentials = ProcessSecurity.of(settings, role)
    assert credentials.server_credentials() is not None
    assert settings.of_role(role).tls_cert == str(tmp_path / f"{role}.pem")
    (tmp_path / f"{role}.key").unlink()
    with pytest.raises(ConfigError, match=f"{role}.key"):
        ProcessSecurity.of(settings, role)


@pytest.mark.parametrize("setting", ["tls_cert", "tls_key", "tls_ca"])
def test_a_folder_of_certificates_and_single_files_are_refused(setting: str, tmp_path: Path) -> None:
    settings = SecuritySettings.model_validate({"tls_folder": str(tmp_path), setting: "file.pem"})
    with pytest.raises(ConfigError, match="leave out --tls-cert"):
        ProcessSecurity.of(settings, Role.FRONT)


def test_tokens_need_their_issuer_and_audience(tmp_path: Path) -> None:
    for settings in ({}, {"jwt_issuer": "a"}, {"jwt_audience": "a"}):
        with pytest.raises(ConfigError, match="jwt_issuer"):
            ProcessSecurity.of(SecuritySettings(jwks_file=str(tmp_path / "jwks.json"), **settings), Role.GATEWAY)


def test_a_start_without_credentials_loads_no_library_for_them() -> None:
    code = (
        "import sys, gateway.main; from kvrelay.config.security_settings import SecuritySettings as S\n"
        "from kvrelay.security.process_security import ProcessSecurity as P; from kvrelay.security.principal import Role\n"
        "P.of(S(), Role.GATEWAY); print([name for name in sys.modules if name == 'jwt'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
