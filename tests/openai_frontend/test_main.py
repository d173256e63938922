"""Settings of the process that serves OpenAI's API, and its port."""

import ssl
from pathlib import Path

import aiohttp
import pytest

from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import OpenAISettings
from kvrelay.errors import ConfigError
from kvrelay.openai_frontend import main
from kvrelay.openai_frontend.front import OpenAIFront
from kvrelay.openai_frontend.main import _listening, check_host, keys_of
from kvrelay.openai_frontend.smg import secret_arguments
from kvrelay.security.certificates import CertificatePlan, make_certificates
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity


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
    with pytest.raises(ConfigError, match=r"everybody who reaches the port may ask.*give --insecure"):
        check_host(settings, [])
    check_host(settings.model_copy(update={"security": SecuritySettings(insecure=True)}), [])
    check_host(OpenAISettings(), [])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
@pytest.mark.parametrize(("keys", "keys_file"), [(["key"], None), ([], "keys.yaml")])
def test_keys_come_from_other_hosts_encrypted_or_with_the_word_insecure(
    host: str, keys: list[str], keys_file: str | None
) -> None:
    def settings(host: str, **security: object) -> OpenAISettings:
        given = SecuritySettings.model_validate({"keys_file": keys_file, **security})
        return OpenAISettings(host=host, security=given)

    with pytest.raises(ConfigError, match=r"plain text.*--tls-folder.*give --insecure"):
        check_host(settings(host), keys)
    check_host(settings("127.0.0.1"), keys)
    check_host(settings(host, tls_folder="certificates"), keys)
    check_host(settings(host, insecure=True), keys)


async def test_with_certificates_the_port_speaks_https_and_nothing_else(tmp_path: Path) -> None:
    make_certificates(tmp_path, CertificatePlan("kvrelay.local"))
    files = {"tls_cert": "front.pem", "tls_key": "front.key", "tls_ca": "ca.pem"}
    security = SecuritySettings(**{name: str(tmp_path / file) for name, file in files.items()})
    tls = ProcessSecurity.of(security, Role.FRONT).https_context()
    front = OpenAIFront("http://127.0.0.1:1", ["key"], "upstream key", 1024)
    client = ssl.create_default_context(cafile=security.tls_ca)
    async with _listening(front, OpenAISettings(port=0), tls) as port, aiohttp.ClientSession() as session:
        async with session.get(f"https://127.0.0.1:{port}/v1/models", ssl=client) as answer:
            assert answer.status == 401
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://127.0.0.1:{port}/v1/models")


async def test_smg_gets_its_key_by_its_standard_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], bytes]] = []

    class Child:
        def __init__(
            self, name: str, command: list[str], environment: object, on_line: object, standard_input: bytes = b""
        ) -> None:
            started.append((command, standard_input))

        async def start(self) -> None: ...

        async def stop(self, grace_s: float) -> None: ...

    monkeypatch.setattr(main, "ChildProcess", Child)
    async with main._running(["smg", "launch"], "k3y"):
        pass
    assert started == [(["smg", "launch"], secret_arguments("k3y"))]
