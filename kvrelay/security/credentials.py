"""gRPC's credentials, made of a process's certificate files.

A server asks for its certificate at each handshake. A channel's holder makes another when `digest`
changes.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from kvrelay.security.cluster_key import Challenge, ClusterKey
from kvrelay.security.principal import Role
from kvrelay.security.role_names import peer_roles, server_name, spiffe_id

if TYPE_CHECKING:
    from kvrelay.security.certificate_files import CertificateFiles, Certificates


@dataclass(frozen=True, slots=True)
class ChannelCredentials:
    tls: grpc.ChannelCredentials | None
    """None: plain text."""
    server_name: str | None
    """Name that the server's certificate must have; None: that of the address."""
    digest: bytes
    prover: Callable[[str], str] | None = None
    """Makes the bearer token of a call to an address."""
    cluster_key: ClusterKey | None = None
    """None: certificates prove workers."""

    def challenge(self, role: Role, address: str) -> Challenge | None:
        return None if self.cluster_key is None else Challenge(self.cluster_key, role, address)


Towards = Callable[[Role], ChannelCredentials | None]
"""Credentials for a process of this role, as the files are now; None: plain text."""


def in_plain_text(role: Role) -> None:
    """The `Towards` of a process without certificates."""


class ProcessCertificates:
    def __init__(self, files: CertificateFiles, trust_domain: str) -> None:
        self.files = files
        self._trust_domain = trust_domain
        self._made: ChannelCredentials | None = None

    @classmethod
    def read(cls, certificate: str, key: str, authorities: str, trust_domain: str, role: Role) -> ProcessCertificates:
        # cryptography takes 50 ms to import
        from kvrelay.security.certificate_files import CertificateFiles

        names = (server_name(role, trust_domain), spiffe_id(role, trust_domain))
        return cls(CertificateFiles(certificate, key, authorities, names), trust_domain)

    def peer_roles(self, auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[Role]:
        return peer_roles(auth_context, self._trust_domain)

    def towards(self, role: Role) -> ChannelCredentials:
        current = self.files.current()
        if self._made is None or self._made.digest != current.digest:
            self._made = channel_credentials(current)
        return ChannelCredentials(self._made.tls, server_name(role, self._trust_domain), current.digest)

    def server(self, *, asks_for_certificate: bool) -> grpc.ServerCredentials:
        """`asks_for_certificate`: who has none of our CA fails the handshake.

        gRPC can only ask for one that must be there.
        """
        used = self.files.current()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            current = self.files.current()
            if current.digest == used.digest:
                return None
            used = current
            return _configuration(current, asks_for_certificate)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(used, asks_for_certificate),
            changed,  # type: ignore[arg-type]  # None: as before
            require_client_authentication=asks_for_certificate,
        )


def channel_credentials(certificates: Certificates, server_name: str | None = None) -> ChannelCredentials:
    made = grpc.ssl_channel_credentials(certificates.authorities, certificates.key, certificates.certificate)
    return ChannelCredentials(made, server_name, certificates.digest)


def _configuration(certificates: Certificates, asks_for_certificate: bool) -> grpc.ServerCertificateConfiguration:
    assert certificates.key is not None and certificates.certificate is not None, "a process has both"  # noqa: PT018
    pairs = [(certificates.key, certificates.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, certificates.authorities if asks_for_certificate else None)
