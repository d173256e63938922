"""How certificates name a role."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvrelay.security.principal import Role

SPIFFE_ID = "peer_spiffe_id"
"""gRPC's name for the SPIFFE id of a verified certificate."""
_TRANSPORT = "transport_security_type"


def spiffe_id(role: str, trust_domain: str) -> str:
    return f"spiffe://{trust_domain}/role/{role}"


def server_name(role: str, trust_domain: str) -> str:
    """What a dialler wants to read in the certificate of this role."""
    return f"{role}.{trust_domain}"


def auth_context_of(certificate: Mapping[str, Any] | None) -> dict[str, list[bytes]]:
    """gRPC's description of a verified certificate, from that of `ssl`; empty without one."""
    if not certificate:
        return {}
    names = [name.encode() for kind, name in certificate.get("subjectAltName", ()) if kind == "URI"]
    return {_TRANSPORT: [b"ssl"], SPIFFE_ID: names}


def is_plain_text(auth_context: Mapping[str, Iterable[bytes]]) -> bool:
    return list(auth_context.get(_TRANSPORT, ())) == [b"insecure"]


def peer_roles(auth_context: Mapping[str, Iterable[bytes]], trust_domain: str) -> frozenset[Role]:
    """The roles of a verified certificate; empty without one, and for foreign names."""
    if list(auth_context.get(_TRANSPORT, ())) != [b"ssl"]:
        return frozenset()
    names = list(auth_context.get(SPIFFE_ID, ()))
    if len(names) != 1:
        return frozenset()
    prefix = spiffe_id("", trust_domain).encode()
    role = names[0].removeprefix(prefix) if names[0].startswith(prefix) else b""
    return frozenset(each for each in Role if each.value.encode() == role)
