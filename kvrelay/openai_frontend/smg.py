"""How smg is started, and which of its log lines are worth showing.

smg is a Rust program (the extra `openai`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.errors import StartupError
from kvrelay.own_packages import own_module_command
from kvrelay.runtime.extras import missing_extra, missing_libraries

MAX_GROWTH_OF_BODIES = 6
"""The front writes JSON anew, which may turn one byte into `\\u00e9`."""
_PATIENCE_S = "300"
"""Silence until smg drops a worker. By default it takes a prompt of 3 s for a hang."""


def check_installed() -> None:
    if missing_libraries("openai"):
        raise StartupError(f"OpenAI's API needs smg, which is not installed; {missing_extra('openai')}")


@dataclass(frozen=True, slots=True)
class SmgPorts:
    """Both are on loopback."""

    api: int
    metrics: int


def command(
    ports: SmgPorts, gateway_addresses: Sequence[str], max_body_bytes: int, arguments: Sequence[str] = ()
) -> list[str]:
    """The process reads `secret_arguments` from standard input.

    `arguments` are the user's. They replace defaults, but none of what follows them.
    """
    urls = [f"grpc://{address}" for address in gateway_addresses]
    limit = str(MAX_GROWTH_OF_BODIES * max_body_bytes)
    defaults = [*_launch(ports), "--history-backend", "none"]
    return [*defaults, *arguments, "--max-payload-size", limit, "--worker-urls", *urls]


def secret_arguments(key: str) -> bytes:
    """smg then requires `key` in every request."""
    return f"--api-key\n{key}".encode()


def command_without_gateway(
    ports: SmgPorts, prefill_addresses: Sequence[str], decode_addresses: Sequence[str]
) -> list[str]:
    """For smg directly before workers, in its prefill-decode mode; it asks for no key."""
    prefill = [part for address in prefill_addresses for part in ("--prefill", f"grpc://{address}")]
    decode = [part for address in decode_addresses for part in ("--decode", f"grpc://{address}")]
    return [*_launch(ports), "--pd-disaggregation", *prefill, *decode]


def _launch(ports: SmgPorts) -> list[str]:
    return [
        *own_module_command("kvrelay.openai_frontend.launch_smg", "launch"),
        *("--host", "127.0.0.1", "--port", str(ports.api), "--policy", "round_robin"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports.metrics)),
        # Gateways handle load, liveness and recovery, and their refusals must reach the clients.
        *("--disable-retries", "--disable-circuit-breaker", "--disable-worker-overload-protection"),
        *("--worker-stall-secs", _PATIENCE_S, "--worker-wedge-secs", _PATIENCE_S),
        *(
            "--worker-startup-check-interval",
            "1",
            "--health-check-interval-secs",
            "2",
            "--shutdown-grace-period-secs",
            "1",
        ),
        *("--log-level", "warn"),
    ]


def environment() -> dict[str, str]:
    """No settings of kvrelay, no model hub, no proxy."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KVRELAY_") and not name.lower().endswith("_proxy")
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


_USELESS = ("libturbojpeg not found", "smg::posture")
"""They concern images, which are not served, and the loopback port."""


def is_worth_showing(line: str) -> bool:
    """Drops the Braille banner and `_USELESS` lines."""
    if any("\u2800" <= character <= "\u28ff" for character in line):
        return False
    return bool(line.strip()) and not any(words in line for words in _USELESS)
