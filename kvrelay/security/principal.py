"""Who makes a call, as the guard of the server found out."""

from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

MAX_TENANT_CHARACTERS = 128


class Role(StrEnum):
    """What a caller may do; `method_rules` says which method takes which role."""

    CLIENT = "client"
    """Its own tenant's requests."""
    OPERATOR = "operator"
    """Requests of all tenants, the cluster, the live page."""
    METRICS = "metrics"
    """/metrics only."""
    GATEWAY = "gateway"
    """Sessions with workers, and requests that another gateway owns."""
    PREFILL = "prefill"
    """Pushes KV to decode workers."""
    DECODE = "decode"
    """Asks prefill workers, where a front uses workers without a gateway."""
    FRONT = "front"
    """Speaks for the tenants that its credential names."""


@dataclass(frozen=True, slots=True)
class Limits:
    """None leaves a limit to the gateway's settings."""

    running_requests: int | None = None
    queued_prompt_tokens: int | None = None
    output_tokens_per_minute: int | None = None
    formats_per_minute: int | None = None
    """Response formats that must be compiled."""
    stored_bytes: int | None = None
    unattended_requests: int | None = None
    """Resumable requests whose client is gone."""
    weight: int = 1
    """Share of a full gateway, relative to other tenants' weights."""


@dataclass(frozen=True, slots=True)
class Principal:
    """`tenant` None: any, as for local users. `key_id` names the credential in logs; no secret."""

    roles: frozenset[Role]
    tenant: str | None
    key_id: str
    limits: Limits = field(default_factory=Limits)
    front_tenants: frozenset[str] = frozenset()
    """Other tenants that a front may name."""
    proof: str = field(default="", repr=False)
    """The key or signer behind it, with tenant and roles; "" needs no watching."""
    expires_at_s: float | None = None
    """Unix time after which the caller may begin nothing new."""

    @property
    def is_operator(self) -> bool:
        return Role.OPERATOR in self.roles

    @property
    def may_name_any_tenant(self) -> bool:
        return self.tenant is None and not self.front_tenants

    @property
    def sees_all_tenants(self) -> bool:
        return self.is_operator or self.may_name_any_tenant

    def may_see(self, tenant: str) -> bool:
        """Whether requests of this tenant exist for the caller."""
        return self.sees_all_tenants or self.tenant == tenant or tenant in self.front_tenants

    def speaking_for(self, tenant: str) -> Self:
        """Loses all other rights."""
        roles = self.roles & {Role.CLIENT, Role.FRONT}
        key_id = f"{self.key_id}/{tenant}"
        return replace(self, roles=roles, tenant=tenant, key_id=key_id, front_tenants=frozenset())


LOCAL = Principal(frozenset(Role), None, "local")
"""Every caller of a process without credentials."""

ANONYMOUS = Principal(frozenset(), "", "anonymous")
"""A caller of a method that is open to everybody."""

_current: ContextVar[Principal] = ContextVar("who makes the call", default=LOCAL)


def current_principal() -> Principal:
    """LOCAL outside calls."""
    return _current.get()


def set_current_principal(principal: Principal) -> None:
    """Only guards of servers call this, before anything else of a call runs."""
    _current.set(principal)
