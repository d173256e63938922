"""Polls over HTTP whether smg, or the front before it, can answer. The caller bounds the wait."""

import asyncio
import ssl
from collections.abc import Mapping

import aiohttp

_POLL_INTERVAL_S = 0.05
_TIMEOUT = aiohttp.ClientTimeout(total=2.0)


async def has_model(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether the smg at this URL has a gateway or workers, and their tokenizer."""
    for path, field in (("/v1/models", "data"), ("/v1/tokenizers", "tokenizers")):
        try:
            async with session.get(url + path, headers=headers, timeout=_TIMEOUT) as answer:
                if answer.status != 200 or not (await answer.json()).get(field):
                    return False
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return False  # not up yet
    return True


async def wait_for_smg(address: str) -> None:
    async with aiohttp.ClientSession() as session:
        while not await has_model(session, f"http://{address}"):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_INTERVAL_S)


async def wait_for_front(address: str, ca: str | None = None) -> None:
    """`ca` names the file with the CA of a front that speaks HTTPS."""
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = False  # the address may be one that its certificate does not name
    scheme = "http" if ca is None else "https"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        while not await _says_ready(session, f"{scheme}://{address}/readiness"):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_INTERVAL_S)


async def _says_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url, timeout=_TIMEOUT) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
