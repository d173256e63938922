"""What `kvrelay certs dev` writes."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from kvrelay.cli.app import run
from kvrelay.errors import ConfigError
from kvrelay.security import certificates
from kvrelay.security.certificates import ALL_ROLES, CertificatePlan
from kvrelay.security.principal import Role
from kvrelay.security.role_names import peer_roles

PLAN = CertificatePlan("cluster.example", ("relay.example", "10.1.2.3"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "certificates"
    certificates.make_certificates(made, PLAN)
    return made


def certificate_of(folder: Path, role: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{role}.pem").read_bytes())


def names_of(folder: Path, role: str) -> x509.SubjectAlternativeName:
    return certificate_of(folder, role).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def is_trusted(folder: Path, role: str, authorities: bytes) -> bool:
    store = Store(x509.load_pem_x509_certificates(authorities))
    try:
        PolicyBuilder().store(store).build_client_verifier().verify(certificate_of(folder, role), [])
    except VerificationError:
        return False
    return True


@pytest.mark.parametrize("role", ALL_ROLES)
def test_each_role_has_a_certificate_that_names_it_and_its_own_key(folder: Path, role: str) -> None:
    certificate, names = certificate_of(folder, role), names_of(folder, role)
    key = serialization.load_pem_private_key((folder / f"{role}.key").read_bytes(), None)
    assert certificate.public_key() == key.public_key()
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://cluster.example/role/{role}"]
    assert f"{role}.cluster.example" in names.get_values_for_type(x509.DNSName)
    assert is_trusted(folder, role, (folder / "ca.pem").read_bytes())


def test_only_processes_that_are_dialled_by_host_have_host_names(folder: Path) -> None:
    for role in ALL_ROLES:
        names = names_of(folder, role)
        addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
        hosts = [name for name in names.get_values_for_type(x509.DNSName) if name != f"{role}.cluster.example"]
        if role in ("gateway", "front", "redis"):
            assert (hosts, addresses) == (["localhost", "relay.example"], ["127.0.0.1", "::1", "10.1.2.3"])
        else:
            assert (hosts, addresses) == ([], [])


def test_a_client_cannot_pose_as_a_server(folder: Path) -> None:
    for role in ALL_ROLES:
        usage = certificate_of(folder, role).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usage) == (role not in ("client", "metrics", "operator"))


def test_only_the_owner_reads_the_folder_and_its_keys(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys = list(folder.glob("*.key"))
    assert len(keys) == len(ALL_ROLES) + 1
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_folder_with_a_ca_is_not_overwritten(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="--force renews"):
        certificates.make_certificates(folder, PLAN)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_renewal_keeps_the_ca_and_the_hosts(folder: Path) -> None:
    ca, serial = (folder / "ca.pem").read_bytes(), certificate_of(folder, "gateway").serial_number
    certificates.renew_certificates(folder, CertificatePlan("cluster.example", ("more.example",)))
    assert (folder / "ca.pem").read_bytes() == ca
    assert certificate_of(folder, "gateway").serial_number != serial
    assert is_trusted(folder, "gateway", ca)
    hosts = names_of(folder, "gateway").get_values_for_type(x509.DNSName)
    assert hosts == ["gateway.cluster.example", "localhost", "relay.example", "more.example"]


def test_a_new_ca_is_trusted_besides_the_old_one_until_that_is_forgotten(folder: Path, tmp_path: Path) -> None:
    old_ca, old_leaf = (folder / "ca.pem").read_bytes(), tmp_path / "old"
    old_leaf.mkdir()
    (old_leaf / "decode.pem").write_bytes((folder / "decode.pem").read_bytes())
    certificates.replace_authority(folder, PLAN)
    both = (folder / "ca.pem").read_bytes()
    assert both.endswith(old_ca)
    assert is_trusted(folder, "decode", both)
    assert is_trusted(old_leaf, "decode", both)
    assert not is_trusted(folder, "decode", old_ca)
    certificates.forget_earlier_authorities(folder)
    new_ca = (folder / "ca.pem").read_bytes()
    assert is_trusted(folder, "decode", new_ca)
    assert not is_trusted(old_leaf, "decode", new_ca)


def test_another_trust_domain_is_refused_on_renewal(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"spiffe://cluster\.example/role/gateway"):
        certificates.renew_certificates(folder, CertificatePlan("other.example"))


def test_a_folder_without_a_ca_cannot_be_renewed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no certificate authority"):
        certificates.renew_certificates(tmp_path, PLAN)


def test_a_host_that_cannot_stand_in_a_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a certificate"):
        certificates.make_certificates(tmp_path / "new", CertificatePlan("cluster.example", ("bücher.example",)))


def certs_dev(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run(["certs", "dev", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_the_command_makes_the_folder_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    assert certs_dev(folder, "--host", "relay.example", "--days", 3) == 0
    assert "relay.example" in names_of(folder, "front").get_values_for_type(x509.DNSName)
    certificate = certificate_of(folder, "front")
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 3
    assert certs_dev(folder) != 0
    assert "--force renews" in capsys.readouterr().err
    assert certs_dev(folder, "--new-ca") == 0
    assert len(x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())) == 2
    assert certs_dev(folder, "--forget-old-ca") == 0
    assert len(x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())) == 1


def context(*ids: bytes, transport: bytes = b"ssl") -> dict[str, list[bytes]]:
    return {"transport_security_type": [transport], "peer_spiffe_id": list(ids)}


@pytest.mark.parametrize("role", Role)
def test_a_certificate_gives_the_role_that_it_names(role: Role) -> None:
    assert peer_roles(context(f"spiffe://t.example/role/{role}".encode()), "t.example") == {role}


@pytest.mark.parametrize(
    "auth_context",
    [
        {},
        {"transport_security_type": [b"ssl"]},
        {"peer_spiffe_id": [b"spiffe://t.example/role/gateway"]},
        context(b"spiffe://t.example/role/gateway", transport=b"insecure"),
        context(b"spiffe://other.example/role/gateway"),
        context(b"spiffe://t.example.evil/role/gateway"),
        context(b"spiffe://t.example/role/gateway/more"),
        context(b"spiffe://t.example/role/"),
        context(b"spiffe://t.example/role/redis"),
        context(b"spiffe://t.example/team/role/gateway"),
        context(b"gateway"),
        context(b"spiffe://t.example/role/gateway", b"spiffe://t.example/role/operator"),
    ],
)
def test_any_other_caller_has_no_role(auth_context: dict[str, list[bytes]]) -> None:
    assert peer_roles(auth_context, "t.example") == frozenset()
