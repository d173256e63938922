"""The sides of `bench tls`: the same work with and without TLS and keys, and one round of each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_credentials import BenchCredentials
from benchmarks.load import LoadRun, run_load
from benchmarks.relay_measurement import BenchCores, RelayBench, RelayLoad, process_cpu_s
from benchmarks.statistics import Spread, spread
from benchmarks.transfer_pair import TransferPair
from benchmarks.workload import parse_workload, plan_requests
from kvrelay.client import AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import (
    DecodeSettings,
    EngineSettings,
    GatewaySettings,
    PrefillSettings,
    RequestSettings,
    ServerSettings,
    TransferSettings,
)
from kvrelay.core.model_spec import KVLayout
from kvrelay.errors import StartupError

PUSHES_PER_ROUND = 5
PLAIN, ENCRYPTED = "plain", "TLS"
SIDES = (PLAIN, ENCRYPTED)


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured on both sides, and what the ratio TLS ÷ plain must keep."""

    name: str
    unit: str
    decimals: int
    least_ratio: float | None = None
    most_ratio: float | None = None

    def is_kept_by(self, ratio: float) -> bool | None:
        """None without a goal."""
        if self.least_ratio is None and self.most_ratio is None:
            return None
        return (self.least_ratio or 0.0) <= ratio <= (self.most_ratio or ratio)


ONE_STREAM = Measure("service, one stream", "tokens/s", 1, least_ratio=0.9)
SIXTEEN = Measure("service, 16 at once", "tokens/s", 1, least_ratio=0.9)
SERVICE_CPU = Measure("all services' CPU for a token", "ms", 2)
"""Of both loads together: other work on the machine changes it less than tokens/s."""
RELAY_CPU = Measure("gateway's CPU for a token", "µs", 0, most_ratio=1.15)
RELAY_MESSAGES = Measure("tokens in a message", "", 2)
PUSH_RATE = Measure("KV push", "GB/s", 2)
PUSH_CPU = Measure("both workers' CPU for KV", "s/GB", 2)

Values = Mapping[Measure, float]
Side = Callable[[int], Awaitable[Values]]
"""One round; round 0 warms up and does not count."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measure over all rounds. `ratio` is TLS ÷ plain, round by round."""

    measure: Measure
    plain: tuple[float, ...]
    encrypted: tuple[float, ...]
    ratio: Spread
    is_kept: bool | None


async def compare(sides: Mapping[str, Side], num_rounds: int, on_round: Callable[[int], None]) -> list[Comparison]:
    """Both sides in turns; the one that begins changes from round to round."""
    rounds: list[dict[str, Values]] = []
    for number in range(num_rounds + 1):
        on_round(number)
        order = SIDES if number % 2 else SIDES[::-1]
        found = {side: await sides[side](number) for side in order}
        if number:
            rounds.append(found)
    return [_comparison(measure, rounds) for measure in rounds[0][PLAIN]]


def _comparison(measure: Measure, rounds: list[dict[str, Values]]) -> Comparison:
    plain, encrypted = (tuple(found[side][measure] for found in rounds) for side in SIDES)
    ratio = spread([above / below for above, below in zip(encrypted, plain, strict=True)])
    return Comparison(measure, plain, encrypted, ratio, measure.is_kept_by(ratio.median))


@dataclass(frozen=True, slots=True)
class ServiceWork:
    """What a cluster is asked in a round: prompts go to its prefill worker, their KV over gRPC."""

    engine: EngineSettings
    prompt_tokens: int = 64
    one_stream_tokens: int = 128
    batch_tokens: int = 48
    batch_size: int = 16


@asynccontextmanager
async def service(work: ServiceWork, credentials: BenchCredentials | None) -> AsyncIterator[Side]:
    """A cluster of gateway, one prefill and one decode worker, and a client."""
    cluster = LocalCluster(
        gateway=GatewaySettings(
            server=ServerSettings(port=0, log_level="warning"),
            requests=RequestSettings(local_prefill_tokens=0),
            security=SecuritySettings() if credentials is None else credentials.keys,
        ),
        prefill=(PrefillSettings(engine=work.engine, transfer=TransferSettings(transfer_transport="grpc")),),
        decode=(DecodeSettings(engine=work.engine),),
        tls_folder=None if credentials is None else str(credentials.folder),
    )
    async with cluster, _client(cluster.gateway_address, credentials) as client:

        async def measure(number: int) -> Values:
            begin_s = sum(process_cpu_s(cluster.pid(name)) for name in cluster.names)
            one = await _tokens_per_s(client, work.prompt_tokens, work.one_stream_tokens, 1, 2 * number)
            many = await _tokens_per_s(client, work.prompt_tokens, work.batch_tokens, work.batch_size, 2 * number + 1)
            cpu_s = sum(process_cpu_s(cluster.pid(name)) for name in cluster.names) - begin_s
            num_tokens = work.one_stream_tokens + work.batch_size * work.batch_tokens
            return {ONE_STREAM: one, SIXTEEN: many, SERVICE_CPU: 1000 * cpu_s / num_tokens}

        yield measure


def _client(address: str, credentials: BenchCredentials | None) -> AsyncClient:
    if credentials is None:
        return AsyncClient(address)
    return AsyncClient(address, api_key=credentials.key, tls=credentials.client_tls)


async def _tokens_per_s(
    client: AsyncClient, prompt_tokens: int, new_tokens: int, num_requests: int, seed: int
) -> float:
    """Of all requests at once, first tokens included."""
    requests = plan_requests(parse_workload(f"{prompt_tokens}->{new_tokens}"), num_requests, seed)
    run = await run_load(client, requests)
    return _num_tokens(run) / run.wall_s


def _num_tokens(run: LoadRun) -> int:
    """Raises StartupError for a request that failed: the figures would mean nothing."""
    num_tokens = 0
    for record in run.records:
        if record.measurement is None:
            raise StartupError(f"a request of the benchmark failed: {record.error}")
        num_tokens += record.measurement.num_tokens
    return num_tokens


@dataclass(frozen=True, slots=True)
class RelayWork:
    """A paced load, which both sides keep up with: then both relay the same messages."""

    tokenizer_folder: Path
    num_streams: int
    tokens_per_s: float
    seconds: float
    num_workers: int = 4


@asynccontextmanager
async def relay(work: RelayWork, credentials: BenchCredentials | None, cores: BenchCores) -> AsyncIterator[Side]:
    """A gateway with a core of its own, between simulated workers and clients."""
    running = RelayBench.running(
        work.tokenizer_folder, num_workers=work.num_workers, credentials=credentials, cores=cores
    )
    load = RelayLoad(work.num_streams, work.tokens_per_s, int(work.tokens_per_s * work.seconds))
    async with running as bench:

        async def measure(number: int) -> Values:
            result = await bench.measure(load)
            cpu_us = result.gateway_cpu_s_per_1000_tokens * 1000
            return {RELAY_CPU: cpu_us, RELAY_MESSAGES: result.tokens_per_message}

        yield measure


@asynccontextmanager
async def push(layout: KVLayout, num_tokens: int, credentials: BenchCredentials | None) -> AsyncIterator[Side]:
    """A prefill worker's sender and a decode worker's receiver, in processes of their own."""
    certificates = None if credentials is None else str(credentials.folder)
    pair = await asyncio.to_thread(
        TransferPair, layout, num_tokens, {"transfer_transport": "grpc"}, certificates=certificates
    )
    with pair:

        async def measure(number: int) -> Values:
            transfers = [await asyncio.to_thread(pair.transfer, num_tokens) for _ in range(PUSHES_PER_ROUND)]
            gigabytes = sum(each.kv_bytes for each in transfers) / 1e9
            wire_s, cpu_s = sum(each.wire_s for each in transfers), sum(each.cpu_s for each in transfers)
            return {PUSH_RATE: gigabytes / wire_s, PUSH_CPU: cpu_s / gigabytes}

        yield measure
        await asyncio.to_thread(pair.check, num_tokens)


def all_cores() -> BenchCores:
    """Divided as they are now: a relay takes some of them from this process."""
    return BenchCores.divided(frozenset(os.sched_getaffinity(0)))
