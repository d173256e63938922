"""The key by which processes of one cluster prove their roles without certificates.

    kvrelay-role.ROLE.TIME.ADDRESS.HMAC of all before it    TIME in ns, ADDRESS in hexadecimal

A server takes such a proof for its own address, made since it listens. So who answers at another,
or did earlier, can use it nowhere. It travels in the clear: the key is for one machine.

A worker's greeting has an HMAC over its role, the address dialled and a random number of each side.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvrelay.core.quoting import quoted
from kvrelay.errors import ConfigError, UnauthenticatedError
from kvrelay.security.principal import Principal, Role

MIN_KEY_BYTES = 32
NONCE_BYTES = 32
_PREFIX = "kvrelay-role"
_WORKER_PREFIX = "kvrelay-worker"
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


@dataclass(frozen=True, slots=True)
class WorkerProof:
    nonce: bytes = b""
    digest: bytes = b""


NO_PROOF = WorkerProof()
ProveWorker = Callable[[bytes, str], WorkerProof]
"""Gets a gateway's nonce and the address dialled."""


def prove_nothing(nonce: bytes, address: str) -> WorkerProof:
    return NO_PROOF


class Challenge:
    """For one session with a worker."""

    def __init__(self, key: "ClusterKey", role: Role, address: str) -> None:
        self._key = key
        self._role = role
        self.address = address
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def is_met_by(self, proof: WorkerProof) -> bool:
        expected = self._key.worker_digest(self._role, self.address, self.nonce, proof.nonce)
        return hmac.compare_digest(expected, proof.digest)


class ClusterKey:
    """Takes no proof before `listens`."""

    def __init__(self, key: bytes, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._key = key
        self._clock_ns = clock_ns
        self._is_own: Callable[[str], bool] = lambda address: False
        self._since_ns = 0

    @classmethod
    def read(cls, path: str) -> Self:
        return cls(read_cluster_key(path))

    def listens(self, is_own: Callable[[str], bool]) -> None:
        """Called once the port is bound. `is_own` knows where only this process can answer."""
        self._is_own, self._since_ns = is_own, self._clock_ns()

    def proof_of(self, role: Role, address: str) -> str:
        """For one call, to the address that is dialled."""
        said = f"{_PREFIX}.{role}.{self._clock_ns()}.{address.encode().hex()}"
        return f"{said}.{self._digest(said).decode()}"

    def prove_worker(self, role: Role, nonce: bytes, address: str) -> WorkerProof:
        """Raises UnauthenticatedError for an address of others."""
        if not nonce:  # a gateway of an older version
            return NO_PROOF
        if len(nonce) != NONCE_BYTES or not self._is_own(address):
            raise UnauthenticatedError(
                f"the greeting dials {quoted(address)}, and another process than this one may answer there; dial this "
                f"one by the address at which it listens, with a nonce of {NONCE_BYTES} bytes"
            )
        own = secrets.token_bytes(NONCE_BYTES)
        return WorkerProof(own, self.worker_digest(role, address, nonce, own))

    def worker_digest(self, role: Role, address: str, gateway_nonce: bytes, worker_nonce: bytes) -> bytes:
        said = f"{_WORKER_PREFIX}.{role}.{address.encode().hex()}.{gateway_nonce.hex()}.{worker_nonce.hex()}"
        return hmac.digest(self._key, said.encode(), hashlib.sha256)

    def identify(self, token: str) -> Principal | None:
        """Returns None for tokens of another kind or key. Raises UnauthenticatedError."""
        said, _, digest = token.rpartition(".")
        if not said.startswith(f"{_PREFIX}.") or not hmac.compare_digest(self._digest(said), digest.encode()):
            return None
        _, name, time_ns, address_hex = said.split(".")
        address = bytes.fromhex(address_hex).decode()
        if not self._is_own(address) or int(time_ns) < self._since_ns:
            raise UnauthenticatedError(
                f"the proof is for {quoted(address)}, and for another process than this one; dial this one by the "
                "address at which it listens"
            )
        return Principal(frozenset({Role(name)}), None, f"cluster:{name}")

    @property
    def live_proofs(self) -> frozenset[str]:
        """None: the key lasts as long as the process."""
        return frozenset()

    def _digest(self, said: str) -> bytes:
        return hmac.digest(self._key, said.encode(), hashlib.sha256).hex().encode()
