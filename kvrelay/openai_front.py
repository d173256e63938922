"""OpenAI's HTTP API in front of gateways: how smg, which speaks it, is started and known to be ready. Knows nothing of the API.

smg is a program of its own in Rust (the extra `openai`). It takes the tokenizer and the chat template from the gateways, renders
chats, tokenizes, parses tool calls, and sends tokens to the gateways' VllmEngine.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import aiohttp

from kvrelay.errors import StartupError

_PATIENCE_S = "300"
"""A worker that says nothing for so long is left out by smg. By itself it takes a prompt of three seconds for a hang."""
_POLL_INTERVAL_S = 0.05
_POLL_TIMEOUT_S = 2.0


def check_installed() -> None:
    """Raises StartupError when the extra is not installed."""
    if find_spec("smg") is None or find_spec("smg_grpc_proto") is None:
        raise StartupError("--openai-port needs smg, which is not installed: pip install 'kvrelay[openai]'")


def command(host: str, port: int, metrics_port: int, gateway_addresses: Sequence[str]) -> list[str]:
    """What starts smg on host:port before those gateways. Its own metrics are on `metrics_port`, for this machine only."""
    return [*_launch(host, port, metrics_port), "--worker-urls", *(f"grpc://{address}" for address in gateway_addresses)]


def command_without_gateway(
    host: str, port: int, metrics_port: int, prefill_addresses: Sequence[str], decode_addresses: Sequence[str]
) -> list[str]:
    """What starts smg straight before workers, in its prefill-decode mode."""
    prefill = [part for address in prefill_addresses for part in ("--prefill", f"grpc://{address}")]
    decode = [part for address in decode_addresses for part in ("--decode", f"grpc://{address}")]
    return [*_launch(host, port, metrics_port), "--pd-disaggregation", *prefill, *decode]


def _launch(host: str, port: int, metrics_port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "smg", "launch", "--host", host, "--port", str(port), "--policy", "round_robin"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
        # Who is behind it knows loads and liveness itself, and recovers requests; what is refused there is the clients' to know.
        *("--disable-retries", "--disable-circuit-breaker", "--disable-worker-overload-protection"),
        *("--worker-stall-secs", _PATIENCE_S, "--worker-wedge-secs", _PATIENCE_S),
        *("--worker-startup-check-interval", "1", "--health-check-interval-secs", "2", "--shutdown-grace-period-secs", "1"),
        *("--log-level", "warn"),
    ]


def environment() -> dict[str, str]:
    """smg's: nothing of kvrelay's settings, and no model hub to ask for what the gateways have."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVRELAY_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


async def wait_until_ready(address: str) -> None:
    """Returns once smg has a gateway and its tokenizer. The caller bounds it.

    Args:
        address: host:port.
    """
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_POLL_TIMEOUT_S)) as session:
        for path, field in (("/v1/models", "data"), ("/v1/tokenizers", "tokenizers")):
            while not await _has_entries(session, f"http://{address}{path}", field):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_INTERVAL_S)  # another process's state tells nobody of itself


async def _has_entries(session: aiohttp.ClientSession, url: str, field: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200 and bool((await response.json()).get(field))
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return False  # not up yet
