"""Parses gateway addresses and remembers which one answered last."""

from collections.abc import Sequence

from kvrelay.config.settings import DEFAULT_GATEWAY_PORT
from kvrelay.errors import ConfigError
from kvrelay.network.host_port import join_host_port, quoted, split_host_port

DEFAULT_TIMEOUT_S = 300.0

_PLAIN_SCHEMES = ("grpc", "http", "tcp")
_TLS_SCHEMES = ("https", "grpcs")
_SCHEMES_OF_GRPC = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:", "xds:")
"""gRPC parses these targets itself."""


class AddressError(ConfigError, ValueError):
    """Also a ValueError, like other wrong arguments."""


class Addresses:
    """host:port of the gateways to ask in turn. `addresses` is separated by commas, or a sequence."""

    def __init__(self, addresses: str | Sequence[str]) -> None:
        parts = addresses.split(",") if isinstance(addresses, str) else addresses
        self.all = tuple(gateway_address(part.strip()) for part in parts if part.strip())
        if not self.all:
            raise AddressError("a client needs the address of a gateway, as host:port")
        self._current = 0

    @property
    def current(self) -> str:
        return self.all[self._current]

    def move_on(self) -> None:
        self._current = (self._current + 1) % len(self.all)


def gateway_address(text: str) -> str:
    """Returns host:port as gRPC dials it. Raises AddressError.

    A host alone gets port 50050. IPv6 needs brackets before a port. grpc://, http:// or tcp:// and
    a trailing slash are dropped. gRPC targets (unix:, dns:, ...) stay.
    """
    if text.startswith(_SCHEMES_OF_GRPC):
        return text
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    if "@" in rest:
        raise AddressError("a gateway's address has no user name or password: write host:port alone")
    if scheme.lower() in _TLS_SCHEMES:
        raise AddressError(
            f"{quoted(text)}: the address does not say how to encrypt. "
            "Write host:port, and give Client(tls=TLS(ca=...)), or --tls-ca to commands"
        )
    if scheme and scheme.lower() not in _PLAIN_SCHEMES:
        raise AddressError(
            f"{quoted(text)} is no address of a gateway: write host:port, such as 127.0.0.1:{DEFAULT_GATEWAY_PORT}"
        )
    place, _, path = rest.partition("/")
    if path:
        raise AddressError(
            f"{quoted(text)} has a path, and gRPC has none. Write host:port alone, as in {quoted(place)}"
        )
    try:
        host, port = split_host_port(place)
    except ValueError as error:
        raise AddressError(f"the gateway's address {error}") from None
    return join_host_port(host, DEFAULT_GATEWAY_PORT if port is None else port)
