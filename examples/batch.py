"""Answers one prompt per line of standard input, a few at a time, and prints JSON lines in order."""

import argparse
import asyncio
import json
import sys

from kvrelay.client import AsyncClient
from kvrelay.errors import InvalidRequestError, OverloadedError

NUM_IN_FLIGHT = 8
MAX_TRIES = 5


async def answer(client: AsyncClient, prompt: str, places: asyncio.Semaphore) -> dict[str, str]:
    """One prompt's line of output. An invalid prompt does not stop the others."""
    async with places:
        for tries_left in reversed(range(MAX_TRIES)):
            try:
                # Greedy, so that a second run gives the same.
                completion = await client.complete(prompt, max_tokens=24, temperature=0)
                return {"prompt": prompt, "text": completion.text}
            except InvalidRequestError as wrong:
                return {"prompt": prompt, "error": str(wrong)}
            except OverloadedError as busy:
                if not tries_left:
                    return {"prompt": prompt, "error": str(busy)}
                await asyncio.sleep((busy.retry_after_ms or 1000) / 1000)
    raise AssertionError("the last try returns")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", default="127.0.0.1:50050", help="host:port of the gateway")
    arguments = parser.parse_args()
    prompts = [line.strip() for line in sys.stdin if line.strip()]
    places = asyncio.Semaphore(NUM_IN_FLIGHT)
    async with AsyncClient(arguments.gateway) as client:
        tasks = [asyncio.create_task(answer(client, prompt, places)) for prompt in prompts]
        for task in tasks:
            print(json.dumps(await task, ensure_ascii=False), flush=True)


asyncio.run(main())
