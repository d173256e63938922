"""Makes a cluster's certificate authority, and one certificate for each role, in a folder.

    ca.pem    what everybody trusts: the current CA, then the one before it
    ca.key    signs; keep it away from the servers
    ROLE.pem, ROLE.key

Servers read spiffe://DOMAIN/role/ROLE. Diallers check the DNS name ROLE.DOMAIN, because gRPC checks
names.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvrelay.errors import ConfigError
from kvrelay.security.role_names import server_name, spiffe_id

CA_FILE = "ca.pem"
CA_KEY_FILE = "ca.key"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
CA_DAYS = 3650
CLOCK_DIFFERENCE = datetime.timedelta(minutes=5)
"""A certificate is valid this long before it is made: clocks of machines differ."""

REDIS = "redis"
"""No role of kvrelay: the certificate of a Redis server."""
HOST_ROLES = ("gateway", "front", REDIS)
"""Dialled by host name. Other certificates name no host, so their owners cannot pose as one."""
SERVER_ROLES = (*HOST_ROLES, "prefill", "decode")
CLIENT_ROLES = ("operator", "client", "metrics")
ALL_ROLES = (*SERVER_ROLES, *CLIENT_ROLES)


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    earlier: tuple[x509.Certificate, ...] = ()
    """CAs that are still trusted."""


@dataclass(frozen=True, slots=True)
class CertificatePlan:
    """`hosts` are names and addresses besides LOCAL_HOSTS."""

    trust_domain: str
    hosts: tuple[str, ...] = ()
    num_days: int = 365


def make_certificates(folder: Path, plan: CertificatePlan) -> None:
    """Makes the folder with everything in it. Raises ConfigError if it has a CA."""
    if (folder / CA_KEY_FILE).exists():
        raise ConfigError(
            f"{folder} has a certificate authority: --force renews the certificates under it, "
            "--new-ca makes another that is trusted besides it"
        )
    write_all(folder, new_authority(plan.trust_domain), plan)


def renew_certificates(folder: Path, plan: CertificatePlan) -> None:
    """New certificates and keys of all roles under the folder's CA. Hosts named before stay."""
    write_all(folder, read_authority(folder), _with_hosts_before(folder, plan))


def replace_authority(folder: Path, plan: CertificatePlan) -> None:
    """A new CA, trusted besides the one before it, and new certificates under it."""
    before = read_authority(folder)
    authority = replace(new_authority(plan.trust_domain), earlier=(before.certificate,))
    write_all(folder, authority, _with_hosts_before(folder, plan))


def forget_earlier_authorities(folder: Path) -> None:
    """Only the current CA stays trusted. Certificates stay."""
    authority = replace(read_authority(folder), earlier=())
    _write(folder / CA_FILE, _bundle(authority), 0o644)


def new_authority(trust_domain: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: with equal names, a chain could be built with the wrong one of two CAs.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{trust_domain} CA {os.urandom(4).hex()}")])
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def read_authority(folder: Path) -> Authority:
    try:
        current, *earlier = x509.load_pem_x509_certificates((folder / CA_FILE).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no certificate authority that can be read ({error}); leave --force and --new-ca out to make one"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != current.public_key():
        raise ConfigError(f"{folder / CA_KEY_FILE} is not the key of the first certificate in {folder / CA_FILE}")
    return Authority(current, key, tuple(earlier))


def write_all(folder: Path, authority: Authority, plan: CertificatePlan) -> None:
    """What is trusted goes first: then no process meets a certificate that it does not know."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    _write(folder / CA_FILE, _bundle(authority), 0o644)
    _write(folder / CA_KEY_FILE, _key_pem(authority.key), 0o600)
    for role in ALL_ROLES:
        key_pem, certificate_pem = issue(authority, role, plan)
        _write(folder / f"{role}.key", key_pem, 0o600)
        _write(folder / f"{role}.pem", certificate_pem, 0o644)


def issue(authority: Authority, role: str, plan: CertificatePlan) -> tuple[bytes, bytes]:
    """The private key and the certificate, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role in SERVER_ROLES:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
    names = _alternative_names(role, plan)
    certificate = (
        _builder(subject, authority.certificate.subject, key.public_key(), plan.num_days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return _key_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def _alternative_names(role: str, plan: CertificatePlan) -> list[x509.GeneralName]:
    hosts = (*LOCAL_HOSTS, *plan.hosts) if role in HOST_ROLES else ()
    try:
        return [
            x509.UniformResourceIdentifier(spiffe_id(role, plan.trust_domain)),
            x509.DNSName(server_name(role, plan.trust_domain)),
            *(_host_name(host) for host in dict.fromkeys(hosts)),
        ]
    except ValueError as error:
        raise ConfigError(f"a name cannot stand in a certificate: {error}; use letters, digits, '-' and '.'") from None


def _with_hosts_before(folder: Path, plan: CertificatePlan) -> CertificatePlan:
    """Raises ConfigError for another trust domain: the processes would not know each other."""
    role = HOST_ROLES[0]
    try:
        certificate = x509.load_pem_x509_certificate((folder / f"{role}.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return plan
    own_name = server_name(role, plan.trust_domain)
    hosts = names.get_values_for_type(x509.DNSName)
    if own_name not in hosts:
        ids = ", ".join(names.get_values_for_type(x509.UniformResourceIdentifier))
        raise ConfigError(f"{folder} has certificates of another trust domain, such as {ids}: give --trust-domain")
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return replace(plan, hosts=(*(host for host in hosts if host != own_name), *addresses, *plan.hosts))


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, num_days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_DIFFERENCE)
        .not_valid_after(now + datetime.timedelta(days=num_days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _bundle(authority: Authority) -> bytes:
    certificates: Sequence[x509.Certificate] = (authority.certificate, *authority.earlier)
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replaces the file at once: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
