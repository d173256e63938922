"""Finds out for whom a request asks: the caller's key, completed by the settings."""

from gateway.requests.key_limits import Caller
from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.config.settings import RequestSettings
from kvrelay.security.principal import LOCAL, Limits, Principal


def caller_of(principal: Principal, tenant: str, requests: RequestSettings, quotas: QuotaSettings) -> Caller:
    """Callers without credentials are bound by the gateway's own limits only.

    They do not wait, since nothing separates one from another.
    """
    if principal is LOCAL:
        quarter_of_places = max(requests.max_running_requests // 4, 1)
        unattended = _first(quotas.local_unattended_requests, quarter_of_places)
        return Caller(share=tenant, limits=Limits(unattended_requests=unattended))
    own = principal.limits
    half_of_places = max(requests.max_running_requests // 2, 1)
    half_of_tokens = max(requests.max_queued_prompt_tokens // 2, 1)
    limits = Limits(
        running_requests=_first(own.running_requests, quotas.key_running_requests, half_of_places),
        queued_prompt_tokens=_first(own.queued_prompt_tokens, quotas.key_queued_prompt_tokens, half_of_tokens),
        output_tokens_per_minute=_first(own.output_tokens_per_minute, quotas.key_output_tokens_per_minute),
        formats_per_minute=_first(own.formats_per_minute, quotas.key_formats_per_minute),
        stored_bytes=_first(own.stored_bytes, quotas.key_stored_bytes),
        unattended_requests=_first(own.unattended_requests, quotas.key_unattended_requests),
        weight=max(own.weight, 1),
    )
    return Caller(principal.key_id, tenant, limits, waits=True)


def _first(*choices: int | None) -> int | None:
    return next((choice for choice in choices if choice is not None), None)
