"""What a call's requests belong to: a tenant, by its credential, and a session, by its metadata."""

from collections.abc import Iterable
from contextvars import ContextVar

from kvrelay.core.bounds import check_length
from kvrelay.core.quoting import quoted
from kvrelay.errors import AccessDeniedError, InvalidRequestError
from kvrelay.security.principal import current_principal

SESSION = "kvrelay-session"
"""Metadata with a session key."""

_session_key: ContextVar[str] = ContextVar("session key", default="")


def tenant_of_call(named: str) -> str:
    """`named` is "" where the client names none.

    Raises:
        AccessDeniedError: the caller may not speak for it.
    """
    principal = current_principal()
    if principal.may_name_any_tenant or named in principal.front_tenants:
        return named
    if principal.tenant is None:
        raise AccessDeniedError(
            "the caller's credential has no tenant of its own; name one of those that it may speak for"
        )
    if named in ("", principal.tenant):
        return principal.tenant
    raise AccessDeniedError(
        f"tenant {quoted(named)} is not that of the caller's credential; leave the tenant away, or use its own key"
    )


def take_session_key(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Raises InvalidRequestError for a key that is too long, or given twice."""
    keys = [value for name, value in metadata or () if name == SESSION]
    if len(keys) > 1:
        raise InvalidRequestError(SESSION, "is given more than once; send one key")
    for key in keys:
        check_length(SESSION, str(key))
        _session_key.set(str(key))


def current_session_key() -> str:
    return _session_key.get()
