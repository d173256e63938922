"""One load on one gateway process between simulated workers and clients in processes of their own,
and what came of it.

The gateway has a core to itself; workers, Valkey and clients have the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.bench_credentials import BenchCredentials
from benchmarks.http2_streams import Access
from benchmarks.relay_client import ClientRecord, StreamPlan, run_streams
from benchmarks.relay_floor import FloorPlan, FloorRecord, run_floor
from benchmarks.simulated_worker import SimulatedWorker
from benchmarks.statistics import percentile
from kvrelay.cluster.local_cluster import GATEWAY_NAME, LocalCluster
from kvrelay.config.security_settings import PeerSettings, SecuritySettings
from kvrelay.config.settings import GatewaySettings, RequestSettings, ServerSettings
from kvrelay.errors import StartupError
from kvrelay.testing.waiting import wait_until

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class BenchCores:
    """Who runs where. On a machine with one core, all on that."""

    gateway: frozenset[int]
    others: frozenset[int]

    @staticmethod
    def divided(available: frozenset[int]) -> BenchCores:
        """One for the gateway, the rest for those around it."""
        first = min(available)
        return BenchCores(frozenset({first}), available - {first} or available)


@dataclass(frozen=True, slots=True)
class RelayLoad:
    """What is sent through the gateway.

    tokens_per_s: over all streams; None: as fast as the gateway reads.
    """

    num_streams: int
    tokens_per_s: float | None
    num_tokens: int
    coalesce_ms: int = 0


@dataclass(frozen=True, slots=True)
class RelayResult:
    """What came of one load. Latencies are from the step's sending by the worker to the client's
    receipt, in milliseconds.

    All streams end with one step, which nobody's real streams do; the last token of each is apart
    from the others for that.
    """

    num_streams: int
    offered_tokens_per_s: float | None
    coalesce_ms: int
    num_tokens: int
    tokens_per_s: float
    tokens_per_message: float
    gateway_cpu_s_per_1000_tokens: float
    tokens_per_gateway_cpu_s: float
    gateway_cores: float
    client_cpu_s_per_1000_tokens: float
    latency_ms_p50: float
    latency_ms_p99: float
    latency_ms_max: float
    last_latency_ms: float
    """Median over the streams of the last token's latency: grows with the load's length when the
    gateway does not keep up.
    """


class RelayBench:
    """A gateway process and simulated workers. `async with RelayBench.running(...) as bench: await
    bench.measure(load)`
    """

    def __init__(
        self,
        cluster: LocalCluster,
        workers: Sequence[SimulatedWorker],
        started: asyncio.Semaphore,
        pool: ProcessPoolExecutor,
        num_clients: int,
        cores: BenchCores,
        credentials: BenchCredentials | None = None,
    ) -> None:
        self._cluster = cluster
        self._workers = workers
        self._started = started
        self._pool = pool
        self._num_clients = num_clients
        self._cores = cores
        self._access = None if credentials is None else credentials.access

    @staticmethod
    @asynccontextmanager
    async def running(
        tokenizer_folder: Path,
        *,
        num_workers: int = 1,
        num_clients: int = 1,
        credentials: BenchCredentials | None = None,
        cores: BenchCores | None = None,
    ) -> AsyncIterator[RelayBench]:
        """Starts everything; nothing is left at the end. This process, which has the workers, keeps
        to its cores meanwhile. With credentials everything is encrypted, and clients have a key.
        """
        # Processes that multiprocessing starts are to import nothing from the current folder, as
        # our own children.
        os.environ["PYTHONSAFEPATH"] = "1"
        all_cores = frozenset(os.sched_getaffinity(0))
        cores = cores or BenchCores.divided(all_cores)
        gateway = GatewaySettings(
            server=ServerSettings(log_level="warning"),
            requests=RequestSettings(max_running_requests=4096, max_queued_prompt_tokens=2**22),
            security=SecuritySettings() if credentials is None else credentials.keys,
            peers=PeerSettings(any_workers=True),  # simulated ones have no key of the cluster
        )
        tls_folder = None if credentials is None else str(credentials.folder)
        async with AsyncExitStack() as stack:
            stack.callback(pin_process, os.getpid(), all_cores)
            pin_process(os.getpid(), cores.others)
            cluster = LocalCluster(gateway=gateway, prefill=(), decode=(), tls_folder=tls_folder)
            await stack.enter_async_context(cluster)
            pin_process(cluster.pid(GATEWAY_NAME), cores.gateway)
            assert cluster.redis_url is not None, "started with one"
            started = asyncio.Semaphore(0)
            peers: dict[str, SimulatedWorker] = {}
            workers = [
                SimulatedWorker(cluster.redis_url, tokenizer_folder, started, peers, credentials)
                for _ in range(num_workers)
            ]
            for worker in workers:
                await stack.enter_async_context(worker.running())
            connected = "the gateway has sessions with all simulated workers"
            await wait_until(lambda: all(worker.is_connected for worker in workers), connected, START_TIMEOUT_S)
            pool = stack.enter_context(ProcessPoolExecutor(num_clients, mp_context=get_context("spawn")))
            yield RelayBench(cluster, workers, started, pool, num_clients, cores, credentials)

    async def measure(self, load: RelayLoad) -> RelayResult:
        """Opens the streams, waits until all are in the batch, and lets them run to their ends."""
        for worker in self._workers:
            worker.sent_times_s.clear()
        clients = self._start_clients(load, self._cluster.gateway_address, self._access)
        await self._wait_until_started(load.num_streams, clients)
        await asyncio.sleep(0.2)  # what admission left to be written
        begin_s, begin_cpu_s = time.monotonic(), self._gateway_cpu_s()
        await self._run_steps(load)
        records = await clients
        sent = {request_id: times for worker in self._workers for request_id, times in worker.sent_times_s.items()}
        return _result(load, records, sent, begin_s, self._gateway_cpu_s() - begin_cpu_s)

    async def measure_floor(self, load: RelayLoad) -> RelayResult:
        """The same messages, written by a server without a gateway on the gateway's core, which has
        nothing else to do then.
        """
        interval_s = None if load.tokens_per_s is None else load.num_streams / load.tokens_per_s
        num_groups = min(len(self._workers), load.num_streams)
        plan = FloorPlan(load.num_streams, num_groups, _max_tokens(load), interval_s, self._cores.gateway)
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=run_floor, args=(plan, theirs), daemon=True)
        process.start()
        try:
            port = await asyncio.to_thread(ours.recv)
            records = await self._start_clients(load, f"127.0.0.1:{port}")
            ours.send(None)
            floor: FloorRecord = await asyncio.to_thread(ours.recv)
        finally:
            process.terminate()
            await asyncio.to_thread(process.join)
        return _result(load, records, floor.sent_times_s, floor.begin_s, floor.cpu_s)

    def _start_clients(
        self, load: RelayLoad, address: str, access: Access | None = None
    ) -> asyncio.Future[list[ClientRecord]]:
        loop = asyncio.get_running_loop()
        max_tokens = _max_tokens(load)
        shares = [share for share in _shares(load.num_streams, self._num_clients) if share]
        plans = [
            StreamPlan(address, share, max_tokens, load.coalesce_ms, CALL_TIMEOUT_S, self._cores.others, access)
            for share in shares
        ]
        return asyncio.gather(*(loop.run_in_executor(self._pool, run_streams, plan) for plan in plans))

    async def _wait_until_started(self, num_streams: int, clients: asyncio.Future[list[ClientRecord]]) -> None:
        async def all_started() -> None:
            for _ in range(num_streams):
                await self._started.acquire()

        starting = asyncio.create_task(all_started())
        waited: list[asyncio.Future[Any]] = [starting, clients]
        await asyncio.wait(waited, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if clients.done():
            clients.result()  # raises what went wrong
        if not starting.done():
            starting.cancel()
            raise StartupError(f"{num_streams} streams did not start within {START_TIMEOUT_S:g} s")

    async def _run_steps(self, load: RelayLoad) -> None:
        interval_s = None if load.tokens_per_s is None else load.num_streams / load.tokens_per_s

        async def run(number: int, worker: SimulatedWorker) -> None:
            # Steps of several workers do not fall on the same moment.
            await asyncio.sleep((interval_s or 0.0) * number / len(self._workers))
            await worker.run_steps(interval_s)

        await asyncio.gather(
            *(run(number, worker) for number, worker in enumerate(self._workers) if worker.num_running)
        )

    def _gateway_cpu_s(self) -> float:
        return process_cpu_s(self._cluster.pid(GATEWAY_NAME))


def process_cpu_s(pid: int) -> float:
    """CPU seconds of all its threads so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pin_process(pid: int, cores: frozenset[int]) -> None:
    """All threads of a process, and what they will start, run on those cores."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(task.name), cores)


def _result(
    load: RelayLoad,
    records: Sequence[ClientRecord],
    sent: Mapping[str, Sequence[float]],
    begin_s: float,
    cpu_s: float,
) -> RelayResult:
    latencies_ms: list[float] = []
    last_ms = []
    num_messages = num_tokens = 0
    end_s = begin_s
    for stream in (stream for record in records for stream in record.streams):
        times = sent[stream.request_id]
        of_stream_ms: list[float] = []
        for message in stream.messages:
            if message.index == 0:
                continue  # of the prefill, before the load began
            num_messages += 1
            num_tokens += message.num_tokens
            of_stream_ms += [
                (message.time_s - times[message.index + place]) * 1000 for place in range(message.num_tokens)
            ]
        last_ms.append(of_stream_ms[-1])
        latencies_ms += of_stream_ms[:-1] or of_stream_ms
        end_s = max(end_s, stream.messages[-1].time_s)
    return RelayResult(
        num_streams=load.num_streams,
        offered_tokens_per_s=load.tokens_per_s,
        coalesce_ms=load.coalesce_ms,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / (end_s - begin_s),
        tokens_per_message=num_tokens / num_messages,
        gateway_cpu_s_per_1000_tokens=cpu_s / num_tokens * 1000,
        tokens_per_gateway_cpu_s=num_tokens / max(cpu_s, 0.01),
        gateway_cores=cpu_s / (end_s - begin_s),
        client_cpu_s_per_1000_tokens=sum(record.cpu_s for record in records) / num_tokens * 1000,
        latency_ms_p50=percentile(latencies_ms, 50),
        latency_ms_p99=percentile(latencies_ms, 99),
        latency_ms_max=max(latencies_ms),
        last_latency_ms=percentile(last_ms, 50),
    )


def _max_tokens(load: RelayLoad) -> int:
    return max(load.num_tokens // load.num_streams, 2)


def _shares(total: int, num_parts: int) -> list[int]:
    return [total // num_parts + (number < total % num_parts) for number in range(num_parts)]
