"""Binds sockets for a host, and says why it cannot.

A host means all addresses of its name; 0.0.0.0 and :: mean all of the machine, IPv4 and IPv6.
"""

import errno
import ipaddress
import os
import socket

from kvrelay.errors import StartupError
from kvrelay.network.host_port import join_host_port

ANY_HOST = ("0.0.0.0", "::")  # noqa: S104  # a value to compare with
_NUM_TRIES = 8  # a port may be free on one of a name's addresses only


def bind_sockets(host: str, port: int, flag: str, purpose: str = "") -> list[socket.socket]:
    """Binds the port on all addresses of the host; 0 takes one that is free on all.

    The caller closes them. Raises StartupError.
    """
    if not 0 <= port <= 65535:
        raise StartupError(f"there is no port {port}; choose one up to 65535 with {flag}")
    for tries_left in reversed(range(_NUM_TRIES)):
        try:
            return _bind_all(addresses_of(host), port)
        except OSError as error:
            if port == 0 and error.errno == errno.EADDRINUSE and tries_left:
                continue
            raise StartupError(_sentence(join_host_port(host, port) + purpose, host, flag, error)) from error
    raise AssertionError("the last try returns or raises")


def is_loopback(host: str) -> bool:
    """False also for an unknown host."""
    try:
        addresses = addresses_of(host)
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for _, address in addresses)


def check_port(host: str, port: int, flag: str) -> int:
    """The bound port, after a test as by `bind_sockets`."""
    sockets = bind_sockets(host, port, flag)
    try:
        return int(sockets[0].getsockname()[1])
    finally:
        _close(sockets)


def addresses_of(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host in ANY_HOST:
        return (
            [(socket.AF_INET6, "::")] if socket.has_dualstack_ipv6() and _has_ipv6() else [(socket.AF_INET, "0.0.0.0")]  # noqa: S104  # a value to compare with
        )
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(
        dict.fromkeys((family, _with_scope(address)) for family, _, _, _, address in found if family in _FAMILIES)
    )


_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def _with_scope(address: tuple[object, ...]) -> str:
    """A link-local IPv6 address needs the number of its interface."""
    text = str(address[0])
    has_scope = len(address) == 4 and address[3] and "%" not in text
    return f"{text}%{address[3]}" if has_scope else text


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _bind_all(addresses: list[tuple[socket.AddressFamily, str]], port: int) -> list[socket.socket]:
    """Skips a family that the machine lacks if there is another."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in addresses:
            try:
                sockets.append(_bind(family, address, port))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
                continue
            port = int(sockets[0].getsockname()[1])
    except BaseException:
        _close(sockets)
        raise
    if missing is not None and not sockets:
        raise missing
    return sockets


def _bind(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As gRPC does: connections of a server that just ended do not block the port.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        place = socket.getaddrinfo(address, port, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0][4]
        opened.bind(place)
    except BaseException:
        opened.close()
        raise
    return opened


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _sentence(place: str, host: str, flag: str, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        problem = f"{host!r} is neither an address nor a name that is known here"
        return f"cannot listen on {place}: {problem}; choose another --host"
    if error.errno == errno.EADDRINUSE:
        return (
            f"cannot listen on {place}: the port is taken. Free it, or choose another with {flag} (0 takes a free one)"
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        advice = "choose one of its own with --host; 0.0.0.0 stands for all"
        return f"cannot listen on {place}: this machine does not have the address; {advice}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"cannot listen on {place}: this user may not use the port; choose one above 1023 with {flag}"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"cannot listen on {place}: {reason}. Choose another host with --host, or another port with {flag}"
