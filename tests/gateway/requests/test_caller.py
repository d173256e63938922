"""Limits of a key: its own, else those of the settings, else a part of the gateway."""

from dataclasses import fields

import pytest

from gateway.requests.caller import caller_of
from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.config.settings import RequestSettings
from kvrelay.security.principal import LOCAL, Limits, Principal, Role

REQUESTS = RequestSettings(max_running_requests=100, max_queued_prompt_tokens=1000)


def limits_of(own: Limits, **quotas: int) -> Limits:
    principal = Principal(frozenset({Role.CLIENT}), "alice", "alice-1", own)
    caller = caller_of(principal, "alice", REQUESTS, QuotaSettings(**quotas))
    assert (caller.key_id, caller.share, caller.waits) == ("alice-1", "alice", True)
    return caller.limits


def test_a_key_without_limits_has_at_most_half_of_the_gateway_and_a_bound_of_each_other_kind() -> None:
    defaults = QuotaSettings()
    assert limits_of(Limits()) == Limits(
        running_requests=50,
        queued_prompt_tokens=500,
        output_tokens_per_minute=None,  # the operator has to know what models give
        formats_per_minute=defaults.key_formats_per_minute,
        stored_bytes=defaults.key_stored_bytes,
        unattended_requests=defaults.key_unattended_requests,
    )


NAMES = [each.name for each in fields(Limits) if each.name != "weight"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_bound_every_key_and_its_own_entry_goes_before(name: str) -> None:
    assert getattr(limits_of(Limits(), **{f"key_{name}": 7}), name) == 7
    assert getattr(limits_of(Limits(**{name: 3}), **{f"key_{name}": 7}), name) == 3


def test_callers_without_credentials_share_one_bound_on_requests_without_a_client() -> None:
    caller = caller_of(LOCAL, "any", REQUESTS, QuotaSettings())
    assert (caller.limits, caller.waits) == (Limits(unattended_requests=25), False)
