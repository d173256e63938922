"""TLS to Redis. A changed certificate counts from the next connection on."""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis.asyncio
import structlog

from kvrelay.errors import ConfigError
from kvrelay.state.redis_url import CERTIFICATE_FILES, TLS_OPTIONS

_KEY_MISMATCH = "KEY_VALUES_MISMATCH"
_CHECKS = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}

_Stamp = tuple[tuple[int, int, int], ...]
_log = structlog.get_logger(__name__)


class RedisTLS:
    """Files that cannot be used leave the last good ones in use."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for files that cannot be used."""
        self._options = {name: options[name] for name in TLS_OPTIONS if name in options}
        self._paths = [str(self._options[name]) for name in CERTIFICATE_FILES if name in self._options]
        self._refused: _Stamp | None = None
        self._stamp = self._stamp_now()
        self._context = self._read()

    def context(self) -> ssl.SSLContext:
        """For a new connection."""
        stamp = self._stamp_now()
        if stamp not in (self._stamp, self._refused):
            try:
                self._context, self._stamp = self._read(), stamp
                _log.info("certificates for redis were read again", files=self._paths)
            except ConfigError as problem:
                self._refused = stamp
                _log.warning("changed certificates for redis cannot be used; those before stay", problem=str(problem))
        return self._context

    def _stamp_now(self) -> _Stamp:
        """Changes when a file does; () while one is missing."""
        try:
            found = [os.stat(path) for path in self._paths]
        except OSError:
            return ()
        return tuple((each.st_mtime_ns, each.st_ino, each.st_size) for each in found)

    def _read(self) -> ssl.SSLContext:
        for path in self._paths:
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(f"cannot read {path}, which is for TLS with Redis: {error.strerror}") from None
        context = self._with_authorities()
        check = _CHECKS[self._options.get("ssl_cert_reqs", "required")]
        context.check_hostname = check is not ssl.CERT_NONE and self._options.get("ssl_check_hostname", True)
        context.verify_mode = check
        self._load_certificate(context)
        if (ciphers := self._options.get("ssl_ciphers")) is not None:
            try:
                context.set_ciphers(ciphers)
            except ssl.SSLError:
                raise ConfigError("ssl_ciphers of --redis-url names no cipher that OpenSSL has here") from None
        return context

    def _with_authorities(self) -> ssl.SSLContext:
        """Trusts the given CAs only, or the system's where none are given."""
        options = self._options
        file, folder, data = options.get("ssl_ca_certs"), options.get("ssl_ca_path"), options.get("ssl_ca_data")
        try:
            return ssl.create_default_context(cafile=file, capath=folder, cadata=data)
        except (OSError, ValueError):
            raise ConfigError(f"{file or folder or 'ssl_ca_data'} has no PEM certificates of CAs for Redis") from None

    def _load_certificate(self, context: ssl.SSLContext) -> None:
        certificate, key = self._options.get("ssl_certfile"), self._options.get("ssl_keyfile")
        if certificate is None:
            return
        try:
            # Without any password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(certificate, key, self._options.get("ssl_password", ""))
        except OSError as error:
            if isinstance(error, ssl.SSLError) and error.reason == _KEY_MISMATCH:
                raise ConfigError(f"{key or certificate} is not the key of the certificate in {certificate}") from None
            raise ConfigError(
                f"{certificate} and {key or certificate} are no PEM certificate and its key, or the key is encrypted: "
                "write it without a password"
            ) from None


class TLSConnection(redis.asyncio.SSLConnection):
    def __init__(self, *, tls: RedisTLS, **options: Any) -> None:
        super().__init__(**options)
        self._tls = tls

    def _connection_arguments(self) -> Mapping[str, Any]:
        """redis-py keeps a context as long as the connection object, through reconnections."""
        self.ssl_context.context = self._tls.context()
        arguments: Mapping[str, Any] = super()._connection_arguments()
        return arguments
