"""`make bench`: TTFT, ITL and throughput of a cluster under a closed loop of clients.

    python -m benchmarks [--address HOST:PORT] [--requests 32] [--concurrency 4] [--prompt-tokens 256] [--max-tokens 64] [--json]

Without an address a cluster with one prefill and one decode worker is started on this machine, with the demo model.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from benchmarks.measurement import Measurement, Summary, measure, summarize
from kvrelay.client import AsyncClient
from kvrelay.config import DecodeSettings, EngineSettings, PrefillSettings
from kvrelay.local_cluster import LocalCluster
from kvrelay.model_store import ModelStore, default_model_dir

TIMEOUT_S = 600.0
# Below any vocabulary's end and above where special tokens lie; prompts are random so that no prefix cache shortens them.
PROMPT_TOKEN_IDS = range(300, 10_000)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measures a cluster as its clients see it.")
    parser.add_argument("--address", help="gateway of a running cluster; default: start one here")
    parser.add_argument("--requests", type=int, default=32, help="requests in all (default 32)")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once (default 4)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="tokens of each prompt (default 256)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of each answer (default 64)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


@asynccontextmanager
async def cluster_address(address: str | None) -> AsyncIterator[str]:
    """The given gateway, or that of a cluster that lives as long as the context."""
    if address is not None:
        yield address
        return
    model = ModelStore(default_model_dir(os.environ)).ensure_demo_model()
    engine = EngineSettings(model=str(model))
    async with LocalCluster(prefill=[PrefillSettings(engine=engine)], decode=[DecodeSettings(engine=engine)]) as cluster:
        yield cluster.gateway_address


async def run(arguments: argparse.Namespace) -> Summary:
    """A first request, not counted, to warm up; then the measured ones."""
    chance = random.Random(0)
    prompts = [chance.choices(PROMPT_TOKEN_IDS, k=arguments.prompt_tokens) for _ in range(arguments.requests + 1)]
    room = asyncio.Semaphore(arguments.concurrency)
    async with cluster_address(arguments.address) as address, AsyncClient(address) as client:

        async def one(prompt: list[int]) -> Measurement:
            async with room:
                stream = client.generate(
                    token_ids=prompt, max_tokens=arguments.max_tokens, temperature=0.0, ignore_eos=True, timeout_s=TIMEOUT_S
                )
                async with stream:
                    return await measure(stream, time.perf_counter)

        await one(prompts.pop())
        begin_s = time.perf_counter()
        measurements = await asyncio.gather(*map(one, prompts))
        return summarize(measurements, time.perf_counter() - begin_s)


def main() -> None:
    arguments = parse_arguments()
    summary = asyncio.run(run(arguments))
    if arguments.json:
        print(json.dumps(asdict(summary) | {"concurrency": arguments.concurrency, "prompt_tokens": arguments.prompt_tokens}))
        return
    table = Table("measure", "value", title=f"{arguments.concurrency} at once, prompts of {arguments.prompt_tokens} tokens")
    table.columns[1].justify = "right"
    for row in summary.rows():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
