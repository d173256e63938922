"""TLS of an HTTP port, made of the certificate files as each handshake finds them.

A caller may show a certificate. Sessions are not resumed: that would bring old certificates back.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from kvrelay.security.certificate_files import CertificateFiles, Certificates

_log = structlog.get_logger(__name__)


def https_context(files: CertificateFiles) -> ssl.SSLContext:
    current = files.current()
    context, newest = _context_of(current), _Newest(files, current)
    context.sni_callback = newest.choose  # each handshake calls it, also without a name
    return context


class _Newest:
    """`ssl` cannot make a context forget a CA, so new files make a new one."""

    def __init__(self, files: CertificateFiles, current: Certificates) -> None:
        self._files = files
        self._digest = current.digest
        self._context = _context_of(current)

    def choose(self, connection: ssl.SSLObject, name: str | None, listening: ssl.SSLContext) -> None:
        current = self._files.current()
        if current.digest != self._digest:
            self._digest = current.digest
            try:
                self._context = _context_of(current)
            except (OSError, ValueError) as failure:  # OpenSSL wants more than the check of the files
                _log.error("HTTPS cannot use changed certificates; those before stay", problem=str(failure))
        connection.context = self._context


def _context_of(certificates: Certificates) -> ssl.SSLContext:
    assert certificates.authorities is not None, "a process has all three files"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: an intermediate CA may be the trusted one
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(cadata=certificates.authorities.decode("ascii", "ignore"))
    _load_pair(context, certificates)
    return context


def _load_pair(context: ssl.SSLContext, certificates: Certificates) -> None:
    """`ssl` takes a pair from files only: this one is in memory and has no name."""
    with open(os.memfd_create("certificate", os.MFD_CLOEXEC), "wb") as file:
        file.write(b"\n".join((certificates.key or b"", certificates.certificate or b"")))
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
