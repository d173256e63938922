"""Makes what containers of a cluster prove to each other who they are by.

    python make_credentials.py FOLDER

FOLDER/ROLE is the volume that containers of one role see, and no others: a certificate of the role
with its key and the CA; for Redis the users, for gateways and workers their password. FOLDER/authority
has the CA's key, and no other container sees it. A role without a folder gets nothing.

What is there stays. Certificates are made anew under the same CA once a third of their time is left,
or when a host is new.
Workers reach the registry in Redis, and read whose a request is: none of them reads or writes requests.
"""

import datetime
import hashlib
import os
import secrets
import sys
from pathlib import Path

from cryptography import x509

from kvrelay.security.certificates import CA_FILE, CertificatePlan, make_certificates, renew_certificates

TRUST_DOMAIN = "kvrelay.local"
WITH_CERTIFICATE = ("redis", "gateway", "prefill", "decode", "front", "metrics", "operator")
USERS = {"gateway": ("gateway",), "worker": ("prefill", "decode")}
"""Redis's users, and the roles that have the password of each."""

_COMMANDS = "+@read +@write +@scripting +@connection -@dangerous +info +time"
_KEYS = {"gateway": "~kvrelay:*", "worker": "~kvrelay:{registry}:* ~kvrelay:{probe*}:* %R~kvrelay:*:owner"}


def make_credentials(folder: Path, trust_domain: str = TRUST_DOMAIN, hosts: tuple[str, ...] = ()) -> None:
    """`hosts` are names and addresses under which gateways, fronts and Redis are dialled."""
    _make_certificates(folder, CertificatePlan(trust_domain, hosts))
    _make_users(folder)


def _make_certificates(folder: Path, plan: CertificatePlan) -> None:
    authority = folder / "authority"
    if not (authority / CA_FILE).exists():
        make_certificates(authority, plan)
    elif not _serves(authority / "gateway.pem", plan):
        renew_certificates(authority, plan)
    for role in WITH_CERTIFICATE:
        if not (folder / role).is_dir():
            continue
        # Prometheus runs as a user of its own: its files are readable in the volume that it alone sees.
        mode = 0o444 if role == "metrics" else 0o400
        _write(folder / role / "ca.pem", (authority / CA_FILE).read_bytes(), mode)
        _write(folder / role / "certificate.pem", (authority / f"{role}.pem").read_bytes(), mode)
        _write(folder / role / "certificate.key", (authority / f"{role}.key").read_bytes(), mode)


def _serves(path: Path, plan: CertificatePlan) -> bool:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {str(name.value) for name in names}
    is_young = end - datetime.datetime.now(datetime.UTC) >= (end - begin) / 3
    return is_young and f"gateway.{plan.trust_domain}" in known and known.issuperset(plan.hosts)


def _make_users(folder: Path) -> None:
    acl_file = folder / "redis/users.acl"
    passwords = [folder / role / "redis-password" for roles in USERS.values() for role in roles]
    if acl_file.exists() and all(path.exists() for path in passwords):
        return
    lines = ["user default off"]
    for user, roles in USERS.items():
        password = secrets.token_hex(32)
        for role in roles:
            _write(folder / role / "redis-password", password.encode())
        lines.append(f"user {user} on #{hashlib.sha256(password.encode()).hexdigest()} {_KEYS[user]} {_COMMANDS}")
    _write(acl_file, ("\n".join(lines) + "\n").encode())


def _write(path: Path, content: bytes, mode: int = 0o400) -> None:
    """Replaces the file at once, and only where it changes."""
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
    temporary.replace(path)


if __name__ == "__main__":
    make_credentials(Path(sys.argv[1]))
