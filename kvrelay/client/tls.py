"""Which gateways a client trusts, and how it proves who it is."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvrelay.errors import ConfigError
from kvrelay.security.credentials import ChannelCredentials, channel_credentials

if TYPE_CHECKING:
    from kvrelay.security.certificate_files import CertificateFiles

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class TLS:
    """Encrypts a client's connections. PEM files; changed ones count for new connections.

    Args:
        ca: CAs of gateways' certificates. Default: those that gRPC trusts.
        cert, key: the client's certificate and private key, where gateways ask for one.
        server_name: name in the gateway's certificate. Default: the host of its address.

    Raises:
        ConfigError: the files cannot be used.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    _files: CertificateFiles = field(init=False, repr=False, compare=False)
    _made: list[ChannelCredentials] = field(init=False, repr=False, compare=False, default_factory=list)
    _lock: threading.Lock = field(init=False, repr=False, compare=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a client's certificate and its key go together: give both or none")
        from kvrelay.security.certificate_files import CertificateFiles  # slow

        certificate, key, ca = (None if path is None else os.fspath(path) for path in (self.cert, self.key, self.ca))
        object.__setattr__(self, "_files", CertificateFiles(certificate, key, ca))

    def credentials(self) -> ChannelCredentials:
        """As the files are now; the same object while they do not change."""
        current = self._files.current()
        with self._lock:
            if not self._made or self._made[0].digest != current.digest:
                self._made[:] = [channel_credentials(current, self.server_name)]
            return self._made[0]
