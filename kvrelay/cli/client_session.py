"""The client that a command talks through, made of its settings."""

from kvrelay.client import Client
from kvrelay.config import ClientSettings
from kvrelay.settings_sources import SettingsSources


def open_client(sources: SettingsSources) -> Client:
    """A client to the gateway that the settings name; the caller closes it.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = sources.load("client", ClientSettings)
    return Client(settings.gateway, timeout_s=settings.timeout_s)
