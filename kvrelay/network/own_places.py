"""At which addresses only this process can answer."""

import ipaddress
import socket

from kvrelay.network.host_port import split_host_port
from kvrelay.network.listening import ANY_HOST, addresses_of
from kvrelay.network.own_address import is_own

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class OwnPlaces:
    """Names count only as advertised: of `localhost`, another process may have one address.

    Args:
        host, port: where the process listens.
        advertised: host:port under which others find it.
    """

    def __init__(self, host: str, port: int, advertised: str) -> None:
        self._port = port
        self._advertised = advertised
        found = addresses_of(host)
        self._addresses = frozenset(_parsed(address) for _, address in found)
        # Binding :: takes the port of IPv4, too.
        self._takes_all = (6, 4) if (socket.AF_INET6, "::") in found else (4,) if host in ANY_HOST else ()

    def __contains__(self, place: str) -> bool:
        if place == self._advertised:
            return True
        try:
            host, port = split_host_port(place)
            address = _parsed(host)
        except ValueError:
            return False
        if port != self._port:
            return False
        return address in self._addresses or (address.version in self._takes_all and is_own(str(address)))


def _parsed(text: str) -> _IPAddress:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
