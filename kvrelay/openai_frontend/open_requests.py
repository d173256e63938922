"""Which client an HTTP request is of, by the id that smg passes on.

Who knows an id acts for its client, so ids are random, and end with their request.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_PREFIXES = {"chat/completions": "chatcmpl", "completions": "cmpl", "responses": "resp", "messages": "msg"}
_NUM_BYTES = 16


@dataclass(frozen=True, slots=True)
class Client:
    tenant: str | None = None
    key: str | None = field(default=None, repr=False)


FRONT_ITSELF = Client()


@dataclass(eq=False, slots=True)
class _OpenRequest:
    client: Client
    cancels: set[Callable[[], object]] = field(default_factory=set)


class OpenRequests:
    def __init__(self) -> None:
        self._open: dict[str, _OpenRequest] = {}

    @contextmanager
    def of(self, client: Client, endpoint: str) -> Iterator[str]:
        """Yields the id of one more, for smg as X-Request-Id."""
        request_id = f"{_PREFIXES.get(endpoint, 'req')}-{secrets.token_hex(_NUM_BYTES)}"
        request = self._open[request_id] = _OpenRequest(client)
        try:
            yield request_id
        finally:
            del self._open[request_id]
            for cancel in request.cancels:
                cancel()

    def client_of(self, engine_id: str) -> Client | None:
        """smg's ids begin with the HTTP request's: chatcmpl-<hex>-<more>."""
        request = self._find(engine_id)
        return None if request is None else request.client

    @contextmanager
    def cancelling(self, engine_id: str, cancel: Callable[[], object]) -> Iterator[None]:
        """Cancels when the HTTP request ends within the block: smg notices late."""
        request = self._find(engine_id)
        if request is None:
            yield
            return
        request.cancels.add(cancel)
        try:
            yield
        finally:
            request.cancels.discard(cancel)

    def _find(self, engine_id: str) -> _OpenRequest | None:
        return self._open.get("-".join(engine_id.split("-", 2)[:2]))
