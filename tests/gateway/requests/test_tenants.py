"""For which tenant a caller may ask, by its credential."""

from collections.abc import Iterator

import pytest

from gateway.requests.tenants import tenant_of_call
from kvrelay.errors import AccessDeniedError
from kvrelay.security.principal import LOCAL, Principal, Role, set_current_principal


@pytest.fixture(autouse=True)
def local_afterwards() -> Iterator[None]:
    yield
    set_current_principal(LOCAL)


def caller(tenant: str | None, *front_tenants: str, role: Role = Role.CLIENT) -> Principal:
    return Principal(frozenset({role}), tenant, "key", front_tenants=frozenset(front_tenants))


OPERATOR = caller(None, role=Role.OPERATOR)


@pytest.mark.parametrize(
    ("principal", "named", "expected"),
    [
        (LOCAL, "", ""),
        (LOCAL, "bank", "bank"),
        (OPERATOR, "bank", "bank"),
        (caller("bank"), "", "bank"),
        (caller("bank"), "bank", "bank"),
        (caller(""), "", ""),
        (caller("front", "bank", "shop"), "", "front"),
        (caller("front", "bank", "shop"), "shop", "shop"),
        (caller(None, "bank"), "bank", "bank"),
    ],
)
def test_a_caller_asks_for_its_own_tenant(principal: Principal, named: str, expected: str) -> None:
    set_current_principal(principal)
    assert tenant_of_call(named) == expected


@pytest.mark.parametrize(
    ("principal", "named"),
    [
        (caller("bank"), "shop"),
        (caller("bank"), "bank "),
        (caller(""), "bank"),
        (caller("front", "bank"), "shop"),
        (caller(None, "bank"), ""),
        (caller(None, "bank"), "shop"),
        (caller("ops", role=Role.OPERATOR), "bank"),
    ],
)
def test_another_tenant_is_refused(principal: Principal, named: str) -> None:
    set_current_principal(principal)
    with pytest.raises(AccessDeniedError):
        tenant_of_call(named)


def test_a_front_sees_the_tenants_that_it_speaks_for_and_no_others() -> None:
    for front in (caller("front", "bank"), caller(None, "bank")):
        assert front.may_see("bank")
        assert not front.may_see("shop")
        assert not front.sees_all_tenants
    assert OPERATOR.may_see("shop")
