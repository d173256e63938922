"""The client that a command talks through, made of its settings."""

from typing import TYPE_CHECKING

from kvrelay.config import ClientSettings
from kvrelay.settings_sources import SettingsSources

if TYPE_CHECKING:
    from kvrelay.client import Client


def open_client(sources: SettingsSources) -> "Client":
    """A client to the gateway that the settings name; the caller closes it.

    Raises:
        ConfigError: a setting is wrong.
    """
    from kvrelay.client import Client  # gRPC is half of the command line's start-up time

    settings = sources.load("client", ClientSettings)
    return Client(settings.gateway, timeout_s=settings.timeout_s)
