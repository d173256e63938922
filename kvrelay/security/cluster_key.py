"""The key by which processes of one cluster prove their roles without certificates.

A process sends an HMAC of its role's name under the key, which proves no other role. It travels in
the clear: the key is for one machine only.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path
from typing import Self

from kvrelay.errors import ConfigError
from kvrelay.security.principal import Principal, Role

MIN_KEY_BYTES = 32
_PREFIX = "kvrelay-role"
_MAX_FILE_BYTES = 4096


class ClusterKeyFile:
    """A random key in a folder that only this user can read, for the processes of one start."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.path: str | None = None
        """None where no folder is writable."""
        with contextlib.suppress(OSError):
            self._folder = tempfile.TemporaryDirectory(prefix="kvrelay-key-")
            path = Path(self._folder.name) / "cluster.key"
            path.touch(0o600)
            path.write_text(secrets.token_hex(MIN_KEY_BYTES), "utf-8")
            self.path = str(path)

    def remove(self) -> None:
        """Idempotent."""
        if self._folder is not None:
            self._folder.cleanup()


def read_cluster_key(path: str) -> bytes:
    """Raises ConfigError for a file that is unreadable, short, or readable for other users."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(_MAX_FILE_BYTES).strip()
    except OSError as failure:
        raise ConfigError(f"cannot read the file of --cluster-key-file: {failure.strerror}: {path}") from None
    if mode & 0o077:
        raise ConfigError(f"other users can read the file of --cluster-key-file; run chmod 600 {path}")
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"the file of --cluster-key-file has a key of {len(key)} bytes; write at least {MIN_KEY_BYTES}, "
            f"such as by `openssl rand -hex 32`: {path}"
        )
    return key


class ClusterKey:
    def __init__(self, key: bytes) -> None:
        self._tokens = {role: _token(key, role) for role in Role}

    @classmethod
    def read(cls, path: str) -> Self:
        return cls(read_cluster_key(path))

    def token_of(self, role: Role) -> str:
        return self._tokens[role]

    def identify(self, token: str) -> Principal | None:
        """Returns None for tokens of another kind or key."""
        if not token.startswith(f"{_PREFIX}."):
            return None
        given = token.encode()
        found = [role for role, known in self._tokens.items() if hmac.compare_digest(known.encode(), given)]
        return Principal(frozenset(found), None, f"cluster:{found[0]}") if found else None

    @property
    def live_proofs(self) -> frozenset[str]:
        """None: the key lasts as long as the process."""
        return frozenset()


def _token(key: bytes, role: Role) -> str:
    digest = hmac.digest(key, f"{_PREFIX}.{role}".encode(), hashlib.sha256).hex()
    return f"{_PREFIX}.{role}.{digest}"
