"""A service that a team might have: it streams a cluster's summary to its caller."""

from collections.abc import AsyncIterator

from kvrelay.client import AsyncClient


async def summarize(client: AsyncClient, text: str) -> AsyncIterator[str]:
    """The summary's pieces. `resumable` survives the death of any process of the cluster."""
    stream = client.generate(f"Text: {text}\nSummary:", max_tokens=60, seed=1, ignore_eos=True, resumable=True)
    async with stream:
        async for delta in stream:
            yield delta.text
