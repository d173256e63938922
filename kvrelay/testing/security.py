"""Everything that protects a cluster, switched on at once, and clients with tenants' keys."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import hashlib
import itertools
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import yaml

from kvrelay.client import TLS, AsyncClient, AsyncStream
from kvrelay.client.stream_state import StreamState
from kvrelay.cluster.local_cluster import AnySettings
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.security.keys import digest_of, new_key

NUM_TENANTS = 31
"""A prime: a load that is sent again has other tenants, who find nothing in caches."""
OPERATOR = "rig-operator"
LIMITS = {
    "running_requests": 64,
    "queued_prompt_tokens": 65_536,
    "output_tokens_per_minute": 1_000_000,
    "stored_bytes": 16 * 1024 * 1024,
    "unattended_requests": 16,
}
"""Of each key: far below what a gateway has, so that what is never given back is felt."""
MAX_REMEMBERED = 4096
MAX_UNCHECKED = 1000

_COMMANDS = ("+@read", "+@write", "+@scripting", "+@connection", "-@dangerous", "+info", "+time")
REDIS_KEYS = {
    "gateway": ("~kvrelay:*",),
    "worker": ("~kvrelay:{registry}:*", "~kvrelay:{probe*}:*", "%R~kvrelay:*:owner"),
}
"""By Redis user, as in docs/guides/security.md."""


class Security:
    """Certificates, keys with limits, Redis users, an audit log of each process, a cache secret."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificates = folder / "certificates"
        self.tenants = tuple(f"tenant-{number:02}" for number in range(NUM_TENANTS))
        self._keys = {name: new_key() for name in (*self.tenants, OPERATOR)}
        self._redis_passwords = {user: secrets.token_hex(32) for user in REDIS_KEYS}
        self._next_tenant = itertools.cycle(self.tenants)
        self._tenants: OrderedDict[str, str] = OrderedDict()
        """By the name that a test gives the tenant."""
        self._streams: deque[tuple[str, StreamState]] = deque(maxlen=MAX_REMEMBERED)
        self._tenants_by_request: dict[str, str] = {}
        self._unchecked: dict[str, str] = {}
        self._withdrawn: set[str] = set()
        self.has_withdrawn = False
        """Whether unknown keys are to be expected."""
        self._write()
        self.tls = TLS(ca=self.certificates / "ca.pem")

    def _write(self) -> None:
        make_certificates(self.certificates, CertificatePlan("kvrelay.local"))
        self._write_keys()
        (self.folder / "cache.secret").write_text(secrets.token_hex(32), "utf-8")
        for user, password in self._redis_passwords.items():
            (self.folder / f"{user}.password").write_text(password, "utf-8")

    def _write_keys(self) -> None:
        entries: list[dict[str, object]] = [
            {
                "id": tenant,
                "sha256": digest_of(self._keys[tenant]),
                "tenant": tenant,
                "limits": {**LIMITS, "weight": 1 + number % 3},
            }
            for number, tenant in enumerate(self.tenants)
            if tenant not in self._withdrawn
        ]
        entries.append({"id": OPERATOR, "sha256": digest_of(self._keys[OPERATOR]), "roles": ["operator"]})
        scratch = self.folder / "keys.new"
        scratch.write_text(yaml.safe_dump({"keys": entries}), "utf-8")
        scratch.rename(self.folder / "keys.yaml")

    # --- the processes ----------------------------------------------------------------------------

    @property
    def of_gateways(self) -> SecuritySettings:
        return SecuritySettings(
            keys_file=str(self.folder / "keys.yaml"), cache_secret_file=str(self.folder / "cache.secret")
        )

    @property
    def valkey_options(self) -> Sequence[str]:
        """Its users. Other users of the machine see hashes only."""
        return [
            word
            for user, password in self._redis_passwords.items()
            for word in (
                *("--user", user, "on", f"#{hashlib.sha256(password.encode()).hexdigest()}"),
                *(*REDIS_KEYS[user], *_COMMANDS),
            )
        ]

    def applied(self, name: str, settings: AnySettings, redis_address: str) -> AnySettings:
        """A process's settings with its own audit log and its Redis user."""
        user = "gateway" if name.startswith("gateway") else "worker"
        server = settings.server.model_copy(
            update={
                "redis_url": f"redis://{user}@{redis_address}/0",
                "redis_password_file": str(self.folder / f"{user}.password"),
            }
        )
        security = settings.security.model_copy(update={"audit_log": str(self.audit_log(name))})
        return settings.model_copy(update={"server": server, "security": security})

    def withdraw(self, tenant: str) -> None:
        """Takes the tenant's key out of the keys file."""
        self._withdrawn.add(tenant)
        self.has_withdrawn = True
        self._write_keys()

    def restore(self, tenant: str) -> None:
        self._withdrawn.discard(tenant)
        self._write_keys()

    def audit_log(self, name: str) -> Path:
        return self.folder / f"{name}.audit"

    # --- the clients ------------------------------------------------------------------------------

    def key_of(self, name: str) -> str:
        return self._keys[name]

    def tenant_of(self, name: str) -> str:
        """Whose key stands for the tenant that a test names."""
        if name in self._keys:
            return name
        tenant = self._tenants.pop(name, None) or next(self._next_tenant)
        self._tenants[name] = tenant
        if len(self._tenants) > MAX_REMEMBERED:
            self._tenants.popitem(last=False)
        return tenant

    def another(self, tenant: str) -> str:
        return self.tenants[(self.tenants.index(tenant) + 1) % len(self.tenants)]

    def note(self, tenant: str, stream: AsyncStream) -> None:
        self._take_accepted()
        self._streams.append((tenant, stream._state))  # the stream itself would keep its connection

    def tenant_of_request(self, request_id: str) -> str | None:
        self._take_accepted()
        return self._tenants_by_request.get(request_id)

    def unchecked(self) -> Mapping[str, str]:
        """Tenants of the requests since `forget_checked`."""
        self._take_accepted()
        return dict(self._unchecked)

    def forget_checked(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._unchecked.pop(request_id, None)

    def _take_accepted(self) -> None:
        waiting, self._streams = self._streams, deque(maxlen=MAX_REMEMBERED)
        for tenant, state in waiting:
            if state.accepted is None:
                self._streams.append((tenant, state))
                continue
            for known, most in ((self._tenants_by_request, MAX_REMEMBERED), (self._unchecked, MAX_UNCHECKED)):
                known[state.accepted.request_id] = tenant
                if len(known) > most:
                    known.pop(next(iter(known)))


class TenantsClient(AsyncClient):
    """Sends a request with its tenant's key, and asks everything else as an operator."""

    def __init__(self, addresses: Sequence[str], security: Security) -> None:
        super().__init__(addresses, tls=security.tls, api_key=security.key_of(OPERATOR))
        self._security = security

    def generate(self, prompt: str | None = None, *, tenant: str = "", **arguments: Any) -> AsyncStream:
        whose = self._security.tenant_of(tenant)
        stream = self.of(whose).generate(prompt, **arguments)
        self._security.note(whose, stream)
        return stream

    def resume(self, request_id: str, from_index: int = 0, **arguments: Any) -> AsyncStream:
        tenant = self._security.tenant_of_request(request_id)
        if tenant is None:
            return super().resume(request_id, from_index, **arguments)
        return self.of(tenant).resume(request_id, from_index, **arguments)

    def of(self, tenant: str) -> AsyncClient:
        """A tenant's client over the connections of this one."""
        return _OneTenant(self, self._security, tenant)


class _OneTenant(AsyncClient):
    def __init__(self, shared: TenantsClient, security: Security, tenant: str) -> None:
        super().__init__(shared._addresses.all, tls=security.tls, api_key=security.key_of(tenant))
        self._addresses = shared._addresses
        self._shared = shared

    def _channel(self, address: str) -> grpc.aio.Channel:
        return self._shared._channel(address)
