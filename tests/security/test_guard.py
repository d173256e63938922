"""Who is let in, by which proof, and what the withdrawal of a key does to running calls."""

import asyncio
from collections.abc import Mapping

import pytest

from kvrelay.errors import AccessDeniedError, InvalidRequestError, UnauthenticatedError
from kvrelay.security.guard import MAX_BEARER_CHARACTERS, TENANT, AuthContext, Guard, Metadata
from kvrelay.security.method_rules import OPEN, Rule
from kvrelay.security.principal import Principal, Role

RULES = {
    "/x.Y/Open": OPEN,
    "/x.Y/Clients": Rule(frozenset({Role.CLIENT})),
    "/x.Y/Gateways": Rule(frozenset({Role.GATEWAY})),
}
ALICE = Principal(frozenset({Role.CLIENT}), "alice", "alice-1", proof="a")


class Tokens:
    """Knows tokens by what a test puts in."""

    def __init__(self, principals: Mapping[str, Principal]) -> None:
        self.principals = dict(principals)

    def identify(self, token: str) -> Principal | None:
        if token == "bad":
            raise UnauthenticatedError("bad token")
        return self.principals.get(token)

    @property
    def live_proofs(self) -> frozenset[str]:
        return frozenset(principal.proof for principal in self.principals.values())


def roles_of(auth_context: AuthContext) -> frozenset[Role]:
    return frozenset(Role(name.decode()) for name in auth_context.get("roles", ()))


def guard_of(*tokens: Tokens, now: float = 0.0) -> Guard:
    return Guard(RULES, tokens or (Tokens({"key": ALICE}),), roles_of, clock=lambda: now)


def check(guard: Guard, method: str, *authorizations: str, certificate: tuple[str, ...] = ()) -> Principal:
    metadata: Metadata = [("authorization", value) for value in authorizations]
    auth_context = {"roles": [role.encode() for role in certificate]}
    return guard.check(method, metadata, auth_context, "ipv4:127.0.0.1:1")


def test_a_known_key_gives_its_principal() -> None:
    assert check(guard_of(), "/x.Y/Clients", "Bearer key") == ALICE
    assert check(guard_of(), "/x.Y/Clients", "bearer  key ") == ALICE


@pytest.mark.parametrize(
    "authorizations",
    [
        (),
        ("Bearer other",),
        ("Bearer bad",),
        ("Bearer ",),
        ("Bearer",),
        ("key",),
        ("Basic key",),
        ("Bearer key", "Bearer key"),
        ("Bearer " + "k" * 10_000,),
    ],
)
def test_a_caller_without_a_valid_key_is_refused(authorizations: tuple[str, ...]) -> None:
    with pytest.raises(UnauthenticatedError) as refused:
        check(guard_of(), "/x.Y/Clients", *authorizations)
    assert "kkkk" not in refused.value.message


def test_no_verifier_gets_a_text_beyond_the_bound() -> None:
    long = "k" * (MAX_BEARER_CHARACTERS + 1)
    guard = guard_of(Tokens({long: ALICE, long[1:]: ALICE}))
    assert check(guard, "/x.Y/Clients", f"Bearer {long[1:]}") == ALICE
    with pytest.raises(UnauthenticatedError, match="cannot be read"):
        check(guard, "/x.Y/Clients", f"Bearer {long}")


def test_bytes_are_no_authorization() -> None:
    with pytest.raises(UnauthenticatedError):
        guard_of().check("/x.Y/Clients", [("authorization", b"Bearer key")], {}, "")


def test_an_open_method_looks_at_no_credentials() -> None:
    for authorizations in ((), ("Bearer bad",)):
        assert not check(guard_of(), "/x.Y/Open", *authorizations).roles


@pytest.mark.parametrize("authorization", ["Bearer key", "Bearer bad"])
def test_a_method_without_a_rule_is_refused_whoever_calls(authorization: str) -> None:
    with pytest.raises(AccessDeniedError, match="no rule"):
        check(guard_of(), "/x.Y/New", authorization, certificate=("gateway", "operator"))


def test_a_role_that_does_not_reach_is_refused() -> None:
    with pytest.raises(AccessDeniedError, match="gateway"):
        check(guard_of(), "/x.Y/Gateways", "Bearer key")
    with pytest.raises(AccessDeniedError):
        check(guard_of(), "/x.Y/Clients", certificate=("prefill",))


def test_a_certificate_proves_roles_but_never_that_of_a_client() -> None:
    assert check(guard_of(), "/x.Y/Gateways", certificate=("gateway",)).tenant is None
    with pytest.raises(AccessDeniedError):
        check(guard_of(), "/x.Y/Clients", certificate=("client",))


def test_a_front_with_a_certificate_alone_speaks_for_the_default_tenant_only() -> None:
    guard = Guard({"/x.Y/Fronts": Rule(frozenset({Role.FRONT}))}, (), roles_of)
    front = check(guard, "/x.Y/Fronts", certificate=("front",))
    assert front.may_see("")
    assert not front.may_see("alice")


def test_a_key_beside_a_certificate_adds_roles_and_names_the_tenant() -> None:
    both = check(guard_of(), "/x.Y/Clients", "Bearer key", certificate=("front",))
    assert (both.roles, both.tenant) == (frozenset({Role.CLIENT, Role.FRONT}), "alice")
    with pytest.raises(UnauthenticatedError):
        check(guard_of(), "/x.Y/Gateways", "Bearer bad", certificate=("gateway",))


FRONTS = {"/x.Y/Fronts": Rule(frozenset({Role.FRONT})), "/x.Y/Operators": Rule(frozenset({Role.OPERATOR}))}


def named(
    guard: Guard, *tenants: str | bytes, token: str | None = None, certificate: tuple[str, ...] = ()
) -> Principal:
    metadata: list[tuple[str, str | bytes]] = [(TENANT, tenant) for tenant in tenants]
    if token is not None:
        metadata.append(("authorization", f"Bearer {token}"))
    auth_context = {"roles": [role.encode() for role in certificate]}
    return guard.check("/x.Y/Fronts", metadata, auth_context, "")


def test_a_front_speaks_for_the_tenants_of_its_key_and_for_no_other() -> None:
    front = Principal(frozenset({Role.FRONT}), "own", "front-1", front_tenants=frozenset({"al", "b\u00f6b"}), proof="f")
    guard = Guard(FRONTS, [Tokens({"key": front})], roles_of)
    assert named(guard, b"own", token="key") == named(guard, token="key") == front
    for tenant in ("al", "b\u00f6b"):
        speaking = named(guard, tenant.encode(), token="key")
        assert (speaking.tenant, speaking.key_id, speaking.proof) == (tenant, f"front-1/{tenant}", "f")
        assert not speaking.may_see("own")
        assert not speaking.may_see("b\u00f6b" if tenant == "al" else "al")
    with pytest.raises(AccessDeniedError, match="may not speak for"):
        named(guard, b"mallory", token="key")


def test_a_front_with_a_certificate_names_tenants_where_clients_have_no_keys() -> None:
    front = named(Guard(FRONTS, (), roles_of), b"alice", certificate=("front",))
    assert (front.tenant, front.may_see("alice"), front.may_see("")) == ("alice", True, False)
    with pytest.raises(AccessDeniedError):
        named(Guard(FRONTS, [Tokens({"key": ALICE})], roles_of), b"alice", certificate=("front",))


def test_a_clients_key_beside_a_fronts_certificate_is_for_its_own_tenant_only() -> None:
    guard = Guard(FRONTS, [Tokens({"key": ALICE})], roles_of)
    assert named(guard, b"alice", token="key", certificate=("front",)).key_id == "alice-1"
    with pytest.raises(AccessDeniedError):
        named(guard, b"bob", token="key", certificate=("front",))


def test_who_speaks_for_a_tenant_has_no_other_rights() -> None:
    any_tenant = Principal(frozenset(Role), None, "all", proof="all")
    guard = Guard(FRONTS, [Tokens({"key": any_tenant})], roles_of)
    speaking = named(guard, b"alice", token="key")
    assert speaking.roles == {Role.CLIENT, Role.FRONT}
    assert not speaking.sees_all_tenants
    with pytest.raises(AccessDeniedError):
        guard.check("/x.Y/Operators", [(TENANT, b"alice"), ("authorization", "Bearer key")], {}, "")


@pytest.mark.parametrize("tenants", [(b"",), (b"\xff",), (b"a", b"b"), ("text",), (b"x" * 129,)])
def test_metadata_that_names_no_tenant_is_refused(tenants: tuple[str | bytes, ...]) -> None:
    any_tenant = Principal(frozenset(Role), None, "all", proof="all")
    with pytest.raises(InvalidRequestError, match=TENANT):
        named(Guard(FRONTS, [Tokens({"key": any_tenant})], roles_of), *tenants, token="key")


def test_a_process_that_takes_no_keys_looks_at_none() -> None:
    guard = Guard(FRONTS, (), roles_of)
    assert named(guard, token="a-clients-key", certificate=("front",)).key_id == "certificate:front"
    with pytest.raises(UnauthenticatedError):
        named(guard, token="a-clients-key")


def test_an_expired_key_begins_nothing_new() -> None:
    tokens = Tokens({"key": Principal(ALICE.roles, "alice", "alice-1", expires_at_s=100.0)})
    assert check(guard_of(tokens, now=99.9), "/x.Y/Clients", "Bearer key").tenant == "alice"
    with pytest.raises(UnauthenticatedError, match="expired"):
        check(guard_of(tokens, now=100.0), "/x.Y/Clients", "Bearer key")


async def hold(guard: Guard, principal: Principal, entered: asyncio.Event) -> None:
    with guard.following(principal):
        entered.set()
        await asyncio.Event().wait()


async def begin(guard: Guard, principal: Principal) -> asyncio.Task[None]:
    entered = asyncio.Event()
    task = asyncio.create_task(hold(guard, principal, entered))
    await entered.wait()
    return task


async def test_a_withdrawn_key_ends_its_running_calls_and_no_others() -> None:
    bob = Principal(ALICE.roles, "bob", "bob-1", proof="b")
    tokens = Tokens({"key": ALICE, "other": bob})
    guard = guard_of(tokens)
    of_alice, of_bob = await begin(guard, ALICE), await begin(guard, bob)
    certified = await begin(guard, Principal(frozenset({Role.GATEWAY}), None, "certificate:gateway"))
    assert guard.end_withdrawn() == 0
    del tokens.principals["key"]
    assert guard.end_withdrawn() == 1
    assert guard.end_withdrawn() == 0, "each call is ended once"
    with pytest.raises(UnauthenticatedError, match="withdrawn"):
        await of_alice
    assert not of_bob.done()
    assert not certified.done()
    for task in (of_bob, certified):
        task.cancel()
    await asyncio.wait([of_bob, certified])
    assert of_bob.cancelled()
    assert certified.cancelled()


async def test_a_call_that_its_client_cancelled_stays_cancelled_when_its_key_is_withdrawn_too() -> None:
    tokens = Tokens({"key": ALICE})
    guard = guard_of(tokens)
    task = await begin(guard, ALICE)
    tokens.principals.clear()
    task.cancel()
    guard.end_withdrawn()
    await asyncio.wait([task])
    assert task.cancelled()
