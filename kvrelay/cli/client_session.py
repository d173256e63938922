"""The client of a command."""

from typing import TYPE_CHECKING

from kvrelay.config.settings import ClientSettings
from kvrelay.config.sources import SettingsSources

if TYPE_CHECKING:
    from kvrelay.client import TLS, Client


def open_client(sources: SettingsSources) -> "Client":
    """The caller closes it."""
    from kvrelay.client import Client  # gRPC takes half of the start-up time
    from kvrelay.client.api_keys import read_api_key

    settings = sources.load("client", ClientSettings)
    return Client(
        settings.gateway,
        timeout_s=settings.timeout_s,
        use_proxy=settings.proxy == "environment",
        tls=tls_of(settings),
        api_key=None if settings.api_key_file is None else read_api_key(settings.api_key_file),
    )


def tls_of(settings: ClientSettings) -> "TLS | None":
    from kvrelay.client import TLS

    if settings.tls_ca is None and settings.tls_cert is None and settings.tls_key is None:
        return None
    return TLS(settings.tls_ca, settings.tls_cert, settings.tls_key, settings.tls_server_name)
