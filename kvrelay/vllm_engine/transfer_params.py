"""What goes from a prefill worker's answer to the decode worker through smg, unread by it: where the prompt was computed."""

import json
from typing import Any

from kvrelay.errors import InvalidRequestError

_FIELD = "kv_transfer_params_json"
_ADDRESS = "kvrelay_prefill_address"
_FINGERPRINT = "kvrelay_fingerprint"


def asks_for_handover(params: str) -> bool:
    """Whether a prefill worker is told that its prompt goes on elsewhere.

    Raises:
        InvalidRequestError: it is no JSON object.
    """
    return _parse(params).get("do_remote_decode") is True


def handover(prefill_address: str, fingerprint: str) -> str:
    """What the prefill worker at host:port answers."""
    values = {"do_remote_decode": False, "do_remote_prefill": True, _ADDRESS: prefill_address, _FINGERPRINT: fingerprint}
    return json.dumps(values)


def prefill_address_of(params: str, fingerprint: str) -> str | None:
    """Where a decode worker finds the prompt's KV; None where it is to be computed here.

    Raises:
        InvalidRequestError: it is no JSON object, comes from another kind of engine, or from one with another model.
    """
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
    try:
        values = json.loads(params)
    except (ValueError, RecursionError):
        raise InvalidRequestError(_FIELD, "is not JSON") from None
    if not isinstance(values, dict):
        raise InvalidRequestError(_FIELD, "is not a JSON object")
    return values
