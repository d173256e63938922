"""API keys of the client, which leave this machine only over TLS."""

import functools
import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvrelay.client.addresses import AddressError
from kvrelay.errors import ConfigError
from kvrelay.network.host_port import quoted, split_host_port

Metadata = tuple[tuple[str, str], ...]

MAX_KEY_CHARACTERS = 8192
_LOCAL_TARGETS = ("unix:", "unix-abstract:")


def call_metadata(api_key: str, addresses: Iterable[str], *, uses_proxy: bool, is_encrypted: bool) -> Metadata:
    """Raises ConfigError if the key cannot be sent, or would cross a network in plain text."""
    if not (
        0 < len(api_key) <= MAX_KEY_CHARACTERS and api_key.isascii() and api_key.isprintable() and " " not in api_key
    ):
        raise AddressError("the API key has characters that no key has; give the text that `kvrelay keys new` showed")
    if uses_proxy and not is_encrypted:
        raise AddressError("the API key would go to a proxy in plain text: connect with TLS, or without the proxy")
    for address in addresses:
        if not is_encrypted and not stays_on_this_machine(address):
            raise AddressError(
                f"the API key would go to {quoted(address)} in plain text: connect with TLS, "
                "or through a tunnel that begins on this machine"
            )
    return (("authorization", f"Bearer {api_key}"),)


def read_api_key(path: str) -> str:
    """Raises ConfigError, which never has the key."""
    try:
        text = Path(path).read_text("ascii")
    except (OSError, UnicodeDecodeError) as failure:
        cause = failure.strerror if isinstance(failure, OSError) else "it is no text"
        raise ConfigError(f"api_key_file {path} cannot be read: {cause}; name a file with one key") from None
    if not (key := text.strip()):
        raise ConfigError(f"api_key_file {path} is empty; write the key into it")
    return key


def with_metadata(stub: Any, metadata: Metadata | None) -> Any:
    return stub if metadata is None else _StubWithMetadata(stub, metadata)


class _StubWithMetadata:
    def __init__(self, stub: Any, metadata: Metadata) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return functools.partial(getattr(self._stub, name), metadata=self._metadata)


def stays_on_this_machine(address: str) -> bool:
    """Asks no resolver, whose answer may change."""
    if address.startswith(_LOCAL_TARGETS):
        return True
    try:
        host, _ = split_host_port(address)
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
