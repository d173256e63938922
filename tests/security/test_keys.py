"""The keys file: what its entries give, and which files are refused without telling a value."""

import contextlib
import datetime
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import ConfigError
from kvrelay.security.keys import digest_of, new_key, parse_keys
from kvrelay.security.principal import Limits, Role

KEY = "kvr_test"


def parse(*entries: dict[str, Any]) -> Any:
    return parse_keys(yaml.safe_dump({"keys": list(entries)}).encode())


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "alice-1", "sha256": digest_of(KEY), "tenant": "alice"} | changes


def test_a_key_gives_its_tenant_roles_and_limits() -> None:
    ring = parse(entry(limits={"running_requests": 8, "weight": 3}, expires=datetime.date(2030, 1, 1)))
    principal = ring.find(KEY)
    assert (principal.tenant, principal.roles, principal.key_id) == ("alice", {Role.CLIENT}, "alice-1")
    assert principal.limits == Limits(running_requests=8, weight=3)
    assert principal.expires_at_s == datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC).timestamp()
    assert ring.proofs == {principal.proof}
    assert digest_of(KEY) not in repr(principal)


def test_every_limit_of_a_principal_can_be_given() -> None:
    values = dict.fromkeys(Limits.__dataclass_fields__, 7)
    assert parse(entry(limits=values)).find(KEY).limits == Limits(**values)


def test_an_unknown_key_and_a_hash_are_no_keys() -> None:
    ring = parse(entry())
    for key in ("kvr_other", "", digest_of(KEY), KEY + " ", "\udcff"):
        assert ring.find(key) is None


def test_a_front_names_the_tenants_it_speaks_for() -> None:
    front = parse(entry(roles=["front"], tenants=["bob"])).find(KEY)
    assert [front.may_see(tenant) for tenant in ("alice", "bob", "carol")] == [True, True, False]


def test_operators_need_no_tenant() -> None:
    assert parse(entry(tenant=None, roles=["operator", "metrics"])).find(KEY).is_operator


def test_a_file_without_keys_lets_no_key_in() -> None:
    assert parse().find(KEY) is None


@pytest.mark.parametrize("change", [{"tenant": "bob"}, {"roles": ["metrics"]}, {"sha256": digest_of("new")}])
def test_a_key_with_other_rights_is_withdrawn_as_it_was(change: dict[str, Any]) -> None:
    assert parse(entry()).proofs.isdisjoint(parse(entry(**change)).proofs)
    assert parse(entry()).proofs == parse(entry(limits={"weight": 2})).proofs, "limits end no call"


@pytest.mark.parametrize(
    "bad",
    [
        entry(id="a b"),
        entry(id=1),
        entry(sha256="0" * 63),
        entry(sha256=KEY),
        entry(tenant=None),
        entry(tenant=""),
        entry(tenant="t" * 200),
        entry(roles=[]),
        entry(roles=["gateway"]),
        entry(roles=["prefill"]),
        entry(roles="client"),
        entry(tenants=["bob"]),
        entry(limits={"weight": 0}),
        entry(limits={"running_requests": -1}),
        entry(limits={"unknown": 1}),
        entry(expires="soon"),
        entry(key=KEY),
        {"id": "a"},
    ],
)
def test_a_wrong_entry_refuses_the_file_and_is_not_quoted(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(entry(id="good", sha256=digest_of("good")), bad)
    assert "keys.1" in refused.value.message
    assert KEY not in refused.value.message


def test_two_entries_with_one_id_or_one_hash_are_refused() -> None:
    for other in (entry(sha256=digest_of("b")), entry(id="b")):
        with pytest.raises(ConfigError, match="two entries"):
            parse(entry(), other)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"keys: {", b"keys:", b"\xff\xfe\xfd", b"keys: [2027-13-45]", b"[" * 5000]
)
def test_a_file_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_keys(data)


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        parse_keys(data)


def test_new_keys_are_random_and_can_stand_in_a_header() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 47 and key.isascii() and key.isprintable() and " " not in key for key in keys)
