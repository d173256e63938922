"""Credentials of a measured cluster: a certificate for each role, and one client's key. Knows
nothing of what is measured.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.http2_streams import Access
from kvrelay.client import TLS
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.security.certificates import CA_FILE, CertificatePlan, make_certificates
from kvrelay.security.credentials import Towards
from kvrelay.security.keys import digest_of, new_key
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity

KEYS_FILE = "keys.yaml"


@dataclass(frozen=True, slots=True)
class BenchCredentials:
    """Files in a folder, and the key that the keys file lets in."""

    folder: Path
    key: str

    @classmethod
    def made_in(cls, folder: Path) -> BenchCredentials:
        """Writes the files."""
        key = new_key()
        make_certificates(folder, CertificatePlan(SecuritySettings().trust_domain))
        entry = f"{{id: bench, tenant: bench, sha256: {digest_of(key)}}}"
        (folder / KEYS_FILE).write_text(f"keys:\n  - {entry}\n", "utf-8")
        return cls(folder, key)

    @property
    def ca_file(self) -> str:
        return str(self.folder / CA_FILE)

    @property
    def keys(self) -> SecuritySettings:
        """Of a gateway, without its certificate."""
        return SecuritySettings(keys_file=str(self.folder / KEYS_FILE))

    @property
    def client_tls(self) -> TLS:
        """Of a client with a key, which has no certificate."""
        return TLS(ca=self.ca_file)

    @property
    def access(self) -> Access:
        """The same for streams without a client library."""
        return Access(self.ca_file, self.key)

    def server_credentials(self, role: Role) -> grpc.ServerCredentials:
        """Of a worker, which wants a certificate from every caller."""
        credentials = self._security(role).server_credentials()
        assert credentials is not None, "it has certificates"
        return credentials

    def towards(self, role: Role) -> Towards:
        """How a process of this role dials others."""
        return self._security(role).towards

    def _security(self, role: Role) -> ProcessSecurity:
        certificate, key = (str(self.folder / f"{role.value}.{ending}") for ending in ("pem", "key"))
        return ProcessSecurity.of(SecuritySettings(tls_cert=certificate, tls_key=key, tls_ca=self.ca_file), role)
