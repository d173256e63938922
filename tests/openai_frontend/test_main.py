"""Settings of the process that serves OpenAI's API."""

import pytest

from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import OpenAISettings
from kvrelay.errors import ConfigError
from kvrelay.openai_frontend.main import check_host, keys_of


def test_keys_are_separated_by_commas() -> None:
    assert keys_of("first, second,") == ["first", "second"]
    assert keys_of(None) == []


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_a_setting_that_names_no_key_does_not_open_the_port_to_everybody(text: str) -> None:
    with pytest.raises(ConfigError, match="openai_api_key names no key"):
        keys_of(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_host_that_others_reach_needs_keys_or_the_word_insecure(host: str) -> None:
    settings = OpenAISettings(host=host)
    with pytest.raises(ConfigError, match="give --insecure"):
        check_host(settings, [])
    check_host(settings, ["key"])
    check_host(settings.model_copy(update={"security": SecuritySettings(insecure=True)}), [])
    check_host(OpenAISettings(), [])
