"""The guard of a server: who calls, and whether the rules let it.

It runs before anything else of a call. A call whose key is withdrawn ends with an error.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from kvrelay.core.quoting import quoted
from kvrelay.errors import AccessDeniedError, InvalidRequestError, KvrelayError, UnauthenticatedError
from kvrelay.security.method_rules import Rule, Rules
from kvrelay.security.principal import ANONYMOUS, LOCAL, MAX_TENANT_CHARACTERS, Principal, Role

AUTHORIZATION = "authorization"
SCHEME = "bearer"
MAX_BEARER_CHARACTERS = 8192
TENANT = "kvrelay-tenant-bin"
"""Names in UTF-8 for which tenant a front calls."""

Metadata = Collection[tuple[str, str | bytes]]
AuthContext = Mapping[str, Iterable[bytes]]
PeerRoles = Callable[[AuthContext], frozenset[Role]]
OnRefused = Callable[[str, str, KvrelayError], None]
"""Gets who called (a key's id, or the peer), the method and the error."""
OnAdmitted = Callable[[Principal, str], None]
"""Gets the caller and the method, in the call's context."""


class CallGuard(Protocol):
    def check(self, method: str, metadata: Metadata, auth_context: AuthContext, peer: str) -> Principal:
        """Raises UnauthenticatedError for no valid proof, AccessDeniedError for no matching rule."""

    def following(self, principal: Principal) -> AbstractContextManager[None]:
        """Ends the block with UnauthenticatedError once the caller's key is withdrawn."""

    def check_expiry(self, principal: Principal) -> None:
        """Raises UnauthenticatedError once the caller may begin nothing new."""


class BearerVerifier(Protocol):
    def identify(self, token: str) -> Principal | None:
        """Returns None for tokens of another kind; UnauthenticatedError for bad ones of this kind."""

    @property
    def live_proofs(self) -> frozenset[str]:
        """Proofs of principals that it would give now."""


@dataclass(eq=False, slots=True)
class _RunningCall:
    task: asyncio.Task[object]
    proof: str
    is_withdrawn: bool = False


class Guard:
    def __init__(
        self,
        rules: Rules,
        verifiers: Sequence[BearerVerifier],
        peer_roles: PeerRoles,
        on_refused: OnRefused = lambda who, method, error: None,
        on_admitted: OnAdmitted = lambda principal, method: None,
        clock: Callable[[], float] = time.time,
        is_local: Callable[[AuthContext], bool] = lambda auth_context: False,
    ) -> None:
        """`is_local`: the caller is LOCAL, without any proof."""
        self._rules = rules
        self._verifiers = verifiers
        self._peer_roles = peer_roles
        self._on_refused = on_refused
        self._on_admitted = on_admitted
        self._clock = clock
        self._is_local = is_local
        self._running: set[_RunningCall] = set()

    def check(self, method: str, metadata: Metadata, auth_context: AuthContext, peer: str) -> Principal:
        who = peer
        try:
            rule = self._rule_of(method)
            if rule.is_open:
                return ANONYMOUS
            principal = LOCAL if self._is_local(auth_context) else self._identify(metadata, auth_context)
            who = principal.key_id
            self.check_expiry(principal)
            principal = self._for_tenant(principal, named_tenant(metadata))
            _check_roles(principal, method, rule)
        except KvrelayError as refusal:
            self._on_refused(who, method, refusal)
            raise
        self._on_admitted(principal, method)
        return principal

    def check_expiry(self, principal: Principal) -> None:
        if principal.expires_at_s is not None and principal.expires_at_s <= self._clock():
            raise UnauthenticatedError(f"the credential of {quoted(principal.key_id)} has expired; ask for a new one")

    @contextmanager
    def following(self, principal: Principal) -> Iterator[None]:
        task = asyncio.current_task()
        if task is None or not principal.proof:
            yield
            return
        call, num_cancels = _RunningCall(task, principal.proof), task.cancelling()
        self._running.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.is_withdrawn and task.uncancel() <= num_cancels:
                raise _withdrawn(principal) from None
            raise
        finally:
            self._running.discard(call)
        if call.is_withdrawn:  # the call ended before the cancellation reached it
            task.uncancel()

    def end_withdrawn(self) -> int:
        """Returns how many it ended."""
        live = frozenset[str]().union(*(verifier.live_proofs for verifier in self._verifiers))
        ended = [call for call in self._running if call.proof not in live and not call.is_withdrawn]
        for call in ended:
            call.is_withdrawn = True
            call.task.cancel()
        return len(ended)

    def _rule_of(self, method: str) -> Rule:
        rule = self._rules.get(method)
        if rule is None:
            raise AccessDeniedError(f"{quoted(method)} has no rule about who may call it, so it is refused")
        return rule

    def _identify(self, metadata: Metadata, auth_context: AuthContext) -> Principal:
        token = bearer_of(metadata)
        roles = self._peer_roles(auth_context)
        certified = _certified(roles) if roles else None
        if certified is not None and (token is None or not self._verifiers):
            return certified  # a process that takes no keys looks at none
        if token is None:
            raise UnauthenticatedError(
                "the call has no credentials; send an API key as `authorization: Bearer KEY`, "
                "with the Python client as Client(api_key=...)"
            )
        known = next((found for each in self._verifiers if (found := each.identify(token)) is not None), None)
        if known is None:
            raise UnauthenticatedError("the key or token is not known here; ask the operator of the cluster for one")
        return known if certified is None else replace(known, roles=known.roles | certified.roles)

    def _for_tenant(self, principal: Principal, tenant: str | None) -> Principal:
        """Where clients have no keys, a front may name any tenant."""
        if tenant is None or tenant == principal.tenant:
            return principal
        decides = Role.FRONT in principal.roles and not self._verifiers
        if not (decides or principal.may_name_any_tenant or tenant in principal.front_tenants):
            raise AccessDeniedError(
                f"the caller's credential may not speak for tenant {quoted(tenant)}; send the key of one of its "
                "clients, or list it under `tenants` of the front's key"
            )
        return principal.speaking_for(tenant)


def named_tenant(metadata: Metadata) -> str | None:
    """Raises InvalidRequestError."""
    values = [value for key, value in metadata if key.lower() == TENANT]
    if not values:
        return None
    try:
        tenant = values[0].decode() if len(values) == 1 and isinstance(values[0], bytes) else ""
    except UnicodeDecodeError:
        tenant = ""
    if not 0 < len(tenant) <= MAX_TENANT_CHARACTERS:
        problem = f"names no tenant; send it once, in UTF-8, with at most {MAX_TENANT_CHARACTERS} characters"
        raise InvalidRequestError(TENANT, problem)
    return tenant


def bearer_of(metadata: Metadata) -> str | None:
    """Raises UnauthenticatedError for several values, or one of another kind."""
    values = [value for key, value in metadata if key.lower() == AUTHORIZATION]
    if not values:
        return None
    text = values[0] if len(values) == 1 and isinstance(values[0], str) else ""
    scheme, _, token = text.partition(" ")
    token = token.strip()
    if scheme.lower() != SCHEME or not token or len(token) > MAX_BEARER_CHARACTERS:
        raise UnauthenticatedError("the authorization cannot be read; send it once, as `authorization: Bearer KEY`")
    return token


def _certified(roles: frozenset[Role]) -> Principal:
    """A certificate names no tenant: clients need a key, and fronts speak for the tenant ""."""
    proven = roles - {Role.CLIENT}
    trusted = proven & {Role.OPERATOR, Role.GATEWAY, Role.PREFILL, Role.DECODE}
    return Principal(proven, None if trusted else "", f"certificate:{'+'.join(sorted(proven))}")


def _check_roles(principal: Principal, method: str, rule: Rule) -> None:
    if not principal.roles & rule.roles:
        roles, needed = ", ".join(sorted(principal.roles)) or "none", ", ".join(sorted(rule.roles))
        raise AccessDeniedError(f"{method} takes a caller with one of the roles {needed}; this one has {roles}")


def _withdrawn(principal: Principal) -> UnauthenticatedError:
    return UnauthenticatedError(f"the credential of {quoted(principal.key_id)} was withdrawn; ask for a new one")
