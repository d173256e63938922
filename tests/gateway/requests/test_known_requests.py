"""An id that is none becomes no key of the store."""

from typing import Any

import pytest

from gateway.requests.known_requests import KnownRequests
from gateway.requests.registry import RunningRequests
from gateway.resume.stored_output import RequestOutputs
from kvrelay.errors import RequestNotFoundError
from kvrelay.security.principal import LOCAL, Principal, Role, set_current_principal


class Untouched:
    """A store that no test may ask."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


CALLERS = {"local": LOCAL, "client": Principal(frozenset({Role.CLIENT}), "alice", "alice-1")}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("odd", ["", "x", "A" * 32, "0" * 31 + "*", "}:kvrelay:{registry}", "0" * 2**20])
async def test_an_odd_id_reaches_no_store(odd: str, caller: str) -> None:
    store: Any = Untouched()
    known = KnownRequests(RunningRequests(), store)
    outputs = RequestOutputs(RunningRequests(), known, store, store, store)
    set_current_principal(CALLERS[caller])
    try:
        for ask in (known.get, known.find, outputs.open_reader):
            with pytest.raises(RequestNotFoundError):
                await ask(odd)
        assert not await outputs.exists(odd)
    finally:
        set_current_principal(LOCAL)
