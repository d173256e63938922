"""Sends planned requests to a gateway and measures each: in a closed loop, at planned times, or
streams under long prompts.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measurement import RequestRecord, measure
from benchmarks.workload import PlannedRequest
from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class LoadRun:
    """All requests of a load, and how long it took."""

    records: tuple[RequestRecord, ...]
    wall_s: float


async def run_load(client: AsyncClient, requests: Sequence[PlannedRequest], concurrency: int | None = None) -> LoadRun:
    """Runs a load to its end.

    Args:
        client: of the cluster.
        requests: those with a time are sent at it, whatever else runs; the others as soon as there
            is room, in their order.
        concurrency: how many of the requests without a time run at once; None: all of them.
    """
    begin_s = time.perf_counter()
    room = asyncio.Semaphore(concurrency or len(requests))

    async def run(request: PlannedRequest) -> RequestRecord:
        if request.at_s is None:
            async with room:
                return await _run(client, request, begin_s)
        await asyncio.sleep(max(begin_s + request.at_s - time.perf_counter(), 0.0))
        return await _run(client, request, begin_s)

    records = await asyncio.gather(*map(run, requests))
    return LoadRun(tuple(records), time.perf_counter() - begin_s)


async def run_streams_under_prompts(
    client: AsyncClient, streams: Sequence[PlannedRequest], prompts: Sequence[PlannedRequest]
) -> LoadRun:
    """Runs streams all at once, and prompts at their times as long as any stream runs; those that
    come later are not sent.
    """
    begin_s = time.perf_counter()
    streaming = asyncio.ensure_future(asyncio.gather(*(_run(client, request, begin_s) for request in streams)))
    records = []
    for request in prompts:
        assert request.at_s is not None, "long prompts come at set times"
        await asyncio.wait([streaming], timeout=max(begin_s + request.at_s - time.perf_counter(), 0.0))
        if streaming.done():
            break
        records.append(asyncio.ensure_future(_run(client, request, begin_s)))
    ended = await streaming
    wall_s = time.perf_counter() - begin_s
    return LoadRun((*ended, *[await record for record in records]), wall_s)


async def _run(client: AsyncClient, request: PlannedRequest, begin_s: float) -> RequestRecord:
    submit_s = time.perf_counter() - begin_s
    num_prompt_tokens = len(request.prompt_token_ids)
    try:
        async with client.generate(
            token_ids=request.prompt_token_ids,
            max_tokens=request.max_tokens,
            temperature=0.0,
            ignore_eos=True,
            timeout_s=TIMEOUT_S,
        ) as stream:
            measurement = await measure(stream, time.perf_counter)
            phases = stream.finished.phases if stream.finished else None
    except KvrelayError as error:
        return RequestRecord(request.kind, num_prompt_tokens, submit_s, None, None, f"{error.reason}: {error.message}")
    return RequestRecord(request.kind, num_prompt_tokens, submit_s, measurement, phases)
