"""Parses and writes host:port, IPv6 with and without brackets.

127.0.0.1:50050    gateway.example    [::1]:50050    ::1    [::1]
"""

import ipaddress

MAX_PORT = 65535
_MAX_QUOTED_CHARACTERS = 100


def split_host_port(text: str) -> tuple[str, int | None]:
    """The host without brackets, and the port or None; ValueError says what is wrong."""
    if text.startswith("["):
        host, closing, rest = text[1:].partition("]")
        if not closing or not _is_ipv6(host) or (rest and not rest.startswith(":")):
            raise ValueError(f"{quoted(text)} is no address: an IPv6 address in brackets is written [::1]:50050")
        return host, _port_of(rest[1:], text) if rest else None
    if text.count(":") > 1:
        if _is_ipv6(text):
            return text, None
        host, _, port = text.rpartition(":")
        hint = f": did you mean [{host}]:{port}?" if _is_ipv6(host) and port.isdecimal() else ", nor an IPv6 address"
        raise ValueError(f"{quoted(text)} is no host:port{hint}")
    host, colon, port = text.partition(":")
    _check_host(host, text)
    return host, _port_of(port, text) if colon else None


def join_host_port(host: str, port: int) -> str:
    """Puts brackets around an IPv6 address."""
    host = host.removeprefix("[").removesuffix("]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def quoted(text: str) -> str:
    """Quotes a user's text: at most 100 characters, control characters escaped."""
    return repr(text if len(text) <= _MAX_QUOTED_CHARACTERS else f"{text[:_MAX_QUOTED_CHARACTERS]}...")


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _check_host(host: str, text: str) -> None:
    if not host:
        raise ValueError(f"{quoted(text)} names no host: write host:port, such as 127.0.0.1:50050")
    if not all(character.isalnum() or character in "-._" for character in host):
        raise ValueError(f"{quoted(text)} is no host:port: a host has letters, digits, '-', '.' and '_' only")


def _port_of(port: str, text: str) -> int:
    if not (port.isascii() and port.isdecimal()) or len(port) > 5 or not 0 < int(port) <= MAX_PORT:
        raise ValueError(f"{quoted(text)} names no port: a port is a number from 1 to {MAX_PORT}")
    return int(port)
