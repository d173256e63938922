"""Whose a call's requests are: the caller's tenant, by the credential."""

from kvrelay.core.quoting import quoted
from kvrelay.errors import AccessDeniedError
from kvrelay.security.principal import current_principal


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
