"""Finds the address of a process that listens on all of them.

Redis on another host, or on      this machine's address on the way to Redis,
an address of this one            which others reach too
Redis on loopback, a Unix socket  the host's name if it leads to this machine, else the address
or an unknown host                on the way to the internet, else 127.0.0.1
"""

import ipaddress
import socket

from kvrelay.network.host_port import join_host_port
from kvrelay.state.redis_url import parse_redis_url

LOOPBACK = "127.0.0.1"
# Documentation addresses: the way to them is the way to the internet.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
_ANY_PORT = 9

_HERE = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104  # a value to compare with


def address_here(host: str, port: int) -> str:
    """Where this machine itself reaches that host and port."""
    return join_host_port(_HERE.get(host, host), port)


def own_address(redis_url: str | None) -> str:
    """A name or an address, IPv6 without brackets."""
    if redis_url is not None and (address := _towards_redis(redis_url)) is not None:
        return address
    name = socket.gethostname()
    if _leads_here(name):
        return name
    return next((address for place in _ELSEWHERE if (address := _source_towards(place)) is not None), LOOPBACK)


def _towards_redis(redis_url: str) -> str | None:
    """None if only this machine could use it."""
    host = parse_redis_url(redis_url).location.get("host")
    if host is None:
        return None
    return next((address for place in _resolve(str(host)) if (address := _source_towards(place)) is not None), None)


def _leads_here(name: str) -> bool:
    addresses = _resolve(name)
    return bool(addresses) and all(is_own(address) for address in addresses)


def _resolve(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: no possible name
        return []
    return list(
        dict.fromkeys(str(place[0]) for family, _, _, _, place in found if family in (socket.AF_INET, socket.AF_INET6))
    )


def is_own(address: str) -> bool:
    try:
        with socket.socket(_family_of(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _source_towards(address: str) -> str | None:
    """The source address of packets; None if others cannot dial it."""
    try:
        with socket.socket(_family_of(address), socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket chooses a route and sends nothing.
            probe.connect((address, _ANY_PORT))
            source = str(probe.getsockname()[0])
    except OSError:
        return None
    parsed = ipaddress.ip_address(source.partition("%")[0])
    return None if parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified else source


def _family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
