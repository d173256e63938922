"""Reads a certificate, its key and the trusted CAs, again whenever the files change."""

import datetime
import hashlib
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from kvrelay.errors import ConfigError

NUM_TRIES = 3
"""A reader may meet files that are just being replaced."""

_Stamp = tuple[tuple[int, int, int], ...]
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Certificates:
    """The content of the files, as PEM. A client may have no certificate, or no CA of its own."""

    certificate: bytes | None
    key: bytes | None = field(repr=False)
    authorities: bytes | None
    digest: bytes
    expires: datetime.datetime | None = None


class CertificateFiles:
    """In any thread. Files that do not fit together leave the last good content in use.

    `needed_names`: DNS names and URIs of which the certificate must have all.
    """

    name = "certificates"

    def __init__(
        self, certificate: str | None, key: str | None, authorities: str | None, needed_names: Collection[str] = ()
    ) -> None:
        self._paths = (certificate, key, authorities)
        self._needed_names = frozenset(needed_names)
        self._lock = threading.Lock()
        self._refused: _Stamp | None = None
        self._problem: str | None = None
        self._stamp, self._current = self._read()

    def current(self) -> Certificates:
        with self._lock:
            try:
                if _stamp(self._paths) != self._stamp:
                    self._stamp, self._current = self._read()
                    _log.info("certificates were read again", file=self._paths[0] or self._paths[2])
                self._problem = None
            except (OSError, ConfigError) as problem:
                self._problem = str(problem)
                self._log_once(problem)
            return self._current

    def poll(self) -> bool:
        """False: new certificates end no call."""
        self.current()
        return False

    @property
    def problem(self) -> str | None:
        """Why the files as they are now do not count, or that those in use have expired."""
        expires = self._current.expires
        if self._problem is None and expires is not None and expires <= datetime.datetime.now(datetime.UTC):
            return _expired(self._paths[0], expires)
        return self._problem

    def _read(self) -> tuple[_Stamp, Certificates]:
        try:
            for _ in range(NUM_TRIES):
                before = _stamp(self._paths)
                contents = [None if path is None else Path(path).read_bytes() for path in self._paths]
                if _stamp(self._paths) == before:
                    break
            else:
                raise ConfigError("certificates change faster than they can be read; write each file once")
        except OSError as error:
            raise ConfigError(
                f"cannot read {error.filename}: {error.strerror}; `kvrelay certs dev` makes files"
            ) from None
        certificate, key, authorities = contents
        expires = self._check(certificate, key, authorities)
        digest = hashlib.sha256(b"".join(len(each or b"").to_bytes(8) + (each or b"") for each in contents)).digest()
        return before, Certificates(certificate, key, authorities, digest, expires)

    def _check(
        self, certificate: bytes | None, key: bytes | None, authorities: bytes | None
    ) -> datetime.datetime | None:
        """Until when the certificate is valid."""
        certificate_file, key_file, ca_file = self._paths
        try:
            if authorities is not None:
                x509.load_pem_x509_certificates(authorities)
        except ValueError:
            raise ConfigError(f"{ca_file} has no PEM certificates of CAs") from None
        if certificate is None or key is None:
            return None
        try:
            leaf = x509.load_pem_x509_certificates(certificate)[0]
            private_key = serialization.load_pem_private_key(key, password=None)
        except (ValueError, TypeError):
            raise ConfigError(
                f"{certificate_file} and {key_file} are no PEM certificate and its unencrypted key"
            ) from None
        if leaf.public_key() != private_key.public_key():
            raise ConfigError(f"{key_file} is not the key of the certificate in {certificate_file}")
        if leaf.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
            raise ConfigError(_expired(certificate_file, leaf.not_valid_after_utc))
        if missing := self._needed_names - _names_of(leaf):
            raise ConfigError(
                f"{certificate_file} does not name {' and '.join(sorted(missing))}; "
                "the other processes would refuse it: see --trust-domain"
            )
        return leaf.not_valid_after_utc

    def _log_once(self, problem: Exception) -> None:
        try:
            stamp = _stamp(self._paths)
        except OSError:
            stamp = ()
        if stamp != self._refused:
            self._refused = stamp
            _log.warning("changed certificates cannot be used; those before stay", problem=str(problem))


def _expired(path: str | None, expires: datetime.datetime) -> str:
    return f"{path} has expired on {expires:%Y-%m-%d}; renew it"


def _names_of(certificate: x509.Certificate) -> frozenset[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(
        (*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.UniformResourceIdentifier))
    )


def _stamp(paths: tuple[str | None, ...]) -> _Stamp:
    found = (os.stat(path) for path in paths if path is not None)
    return tuple((each.st_mtime_ns, each.st_ino, each.st_size) for each in found)
