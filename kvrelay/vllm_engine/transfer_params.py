"""Says where the prompt was computed. smg carries it unread from prefill to decode worker."""

import json
from typing import Any

from kvrelay.core.bounds import check_length
from kvrelay.errors import InvalidRequestError

_FIELD = "kv_transfer_params_json"
_ADDRESS = "kvrelay_prefill_address"
_FINGERPRINT = "kvrelay_fingerprint"
MAX_PARAMS_BYTES = 4096


def asks_for_handoff(params: str) -> bool:
    """Whether another worker continues the prompt."""
    return _parse(params).get("do_remote_decode") is True


def handoff_params(prefill_address: str, fingerprint: str) -> str:
    """What the prefill worker at host:port answers."""
    values = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        _ADDRESS: prefill_address,
        _FINGERPRINT: fingerprint,
    }
    return json.dumps(values)


def prefill_address_of(params: str, fingerprint: str) -> str | None:
    """None: compute the prompt here. Raises InvalidRequestError."""
    values = _parse(params)
    if values.get("do_remote_prefill") is not True:
        return None
    address = values.get(_ADDRESS)
    if not isinstance(address, str):
        raise InvalidRequestError(_FIELD, "is not from a kvrelay prefill worker")
    if values.get(_FINGERPRINT) != fingerprint:
        raise InvalidRequestError(_FIELD, "is from a prefill worker with another model than this decode worker's")
    return address


def _parse(params: str) -> dict[str, Any]:
    check_length(_FIELD, params, MAX_PARAMS_BYTES)
    try:
        values = json.loads(params)
    except (ValueError, RecursionError):
        raise InvalidRequestError(_FIELD, "is not JSON") from None
    if not isinstance(values, dict):
        raise InvalidRequestError(_FIELD, "is not a JSON object")
    return values
