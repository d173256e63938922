"""Who may call what in a simulated cluster: tenants have keys with limits, processes have
certificates, and production's guard and rules decide.

The keys file is a value here. Gateways take a new one over at the second look, as from a disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import yaml

from kvrelay.security.guard import Guard
from kvrelay.security.keys import KeyRing, digest_of, parse_keys
from kvrelay.security.method_rules import GRPC_RULES
from kvrelay.security.principal import Principal, Role
from kvrelay.security.role_names import SPIFFE_ID, peer_roles, spiffe_id

TRUST_DOMAIN = "simulated"
TENANTS = ("first", "other")
SPY = "spy"
"""A tenant that asks for requests of others."""

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SecurityPlan:
    """What a seed draws for a secured cluster."""

    key_running_requests: int
    max_running_requests: int
    place_wait_ms: int
    withdrawn: str
    """The tenant whose key is withdrawn; empty for none."""
    withdrawn_at_s: float


class SimulatedSecurity:
    """All credentials of a cluster, and its keys file as it is now."""

    def __init__(self, plan: SecurityPlan) -> None:
        self._plan = plan
        self.ring = self._ring_of(*TENANTS, SPY)

    def withdraw(self, tenant: str) -> None:
        self.ring = self._ring_of(*(each for each in (*TENANTS, SPY) if each != tenant))

    def _ring_of(self, *tenants: str) -> KeyRing:
        limits = {"running_requests": self._plan.key_running_requests}
        entries = [{"id": each, "sha256": digest_of(_key(each)), "tenant": each, "limits": limits} for each in tenants]
        return parse_keys(yaml.safe_dump({"keys": entries}).encode())


class LoadedKeys:
    """A gateway's keys."""

    def __init__(self, security: SimulatedSecurity) -> None:
        self._security = security
        self._ring = self._seen = security.ring

    def identify(self, token: str) -> Principal | None:
        return self._ring.find(token)

    @property
    def live_proofs(self) -> frozenset[str]:
        return self._ring.proofs

    def poll(self) -> bool:
        """Whether there are new keys: those that were there at the last look, too."""
        now = self._security.ring
        is_new = now is self._seen and now is not self._ring
        if is_new:
            self._ring = now
        self._seen = now
        return is_new


def guard_of(role: Role, keys: LoadedKeys | None) -> Guard:
    return Guard(GRPC_RULES[role], [] if keys is None else [keys], partial(peer_roles, trust_domain=TRUST_DOMAIN))


def certificate_of(role: Role) -> Mapping[str, list[bytes]]:
    """What a server sees of a process with this role's certificate."""
    return {"transport_security_type": [b"ssl"], SPIFFE_ID: [spiffe_id(role, TRUST_DOMAIN).encode()]}


def metadata_of(tenant: str) -> Metadata:
    return (("authorization", f"Bearer {_key(tenant)}"),)


def _key(tenant: str) -> str:
    return f"key-of-{tenant}"
