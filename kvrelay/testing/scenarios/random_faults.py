"""Streams under random faults, checked against the invariants I1 to I7.

Each index once and one end (I1), the undisturbed tokens (I2), nothing left (I3), attempts not mixed
(I4, I5), ends by the deadline (I6), allowed edges (I7).
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.fault_storm import KINDS, FaultStorm
from kvrelay.testing.load import Request, TokenCheck, Tokens, fault_free_tokens, make_request

REQUEST_SETTINGS = {"local_prefill_tokens": 24, "worker_wait_ms": 60_000, "retention_ms": 60_000}
ENGINE = {"num_kv_blocks": 512, "prefill_chunk_tokens": 32}
NUM_DIFFERENT_REQUESTS = 200
NUM_WARM_UP_STREAMS = 50
"""Each gateway opens its usual connections."""
REQUEST_TIMEOUT_S = 60.0
END_MARGIN_S = 1.0
"""After a request's deadline (I6)."""
AT_REST_MARGIN_S = 15.0
SHARE_OF_LEAVERS, SHARE_OF_SLOW = 0.1, 0.05
SLOW_READ_S = 0.05


@dataclass(slots=True)
class StreamReport:
    num_streams: int = 0
    num_left: int = 0
    """Clients that left on purpose."""
    num_tokens: int = 0
    num_retried: int = 0
    longest_pause_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        return {
            "streams": self.num_streams,
            "left": self.num_left,
            "tokens": self.num_tokens,
            "failed": sum(self.errors.values()),
            "errors": dict(self.errors),
            "wrong": len(self.violations),
            "violations": self.violations[:10],
            "retried": self.num_retried,
            "longest_pause_s": round(self.longest_pause_s, 2),
        }


class Streams:
    """Clients that run requests of known tokens."""

    def __init__(self, cluster: FaultCluster, expected: Mapping[Request, Tokens], seed: int) -> None:
        self._connect, self._addresses = cluster.connect, cluster.addresses
        self._expected = expected
        self._requests = list(expected)
        self._seed = seed
        self._next_number = 0
        self._is_ended = False
        self.report = StreamReport()

    def end(self) -> None:
        """Starts no more streams; running ones end as usual."""
        self._is_ended = True

    async def run(
        self, num_clients: int, num_streams: int | None, until: float | None = None, rest_s: float = 0.0
    ) -> None:
        """Runs `num_streams` (None: no bound), and starts none after the monotonic time `until`."""
        last = None if num_streams is None else self._next_number + num_streams

        async def run_client(number: int) -> None:
            first = number % len(self._addresses)
            async with self._connect(self._addresses[first:] + self._addresses[:first]) as client:
                while self._goes_on(last, until):
                    self._next_number += 1
                    await self._run_stream(client, self._next_number)
                    await asyncio.sleep(rest_s)

        await asyncio.gather(*(run_client(number) for number in range(num_clients)))

    def _goes_on(self, last: int | None, until: float | None) -> bool:
        is_over = (last is not None and self._next_number >= last) or (until is not None and time.monotonic() >= until)
        return not is_over and not self._is_ended

    async def _run_stream(self, client: AsyncClient, number: int) -> None:
        generator = random.Random(f"{self._seed} {number}")
        request = generator.choice(self._requests)
        kind = generator.random()
        leave_at = generator.randrange(request.num_tokens) if kind < SHARE_OF_LEAVERS else None
        is_slow = SHARE_OF_LEAVERS <= kind < SHARE_OF_LEAVERS + SHARE_OF_SLOW
        check, begin = TokenCheck(request.num_sequences), time.monotonic()
        last, report = begin, self.report
        report.num_streams += 1
        # A tenant of its own finds no cache entry of another run of the request.
        stream = client.generate(**replace(request, tenant=f"stream-{self._seed}-{number}").options)
        try:
            async for delta in stream:
                check.take(delta)
                now = time.monotonic()
                report.longest_pause_s, last = max(report.longest_pause_s, now - last), now
                if leave_at is not None and len(check.tokens[0]) > leave_at:
                    await stream.cancel()
                    report.num_left += 1
                    break
                if is_slow:
                    await asyncio.sleep(SLOW_READ_S)
        except KvrelayError as error:
            report.errors[f"{type(error).__name__}: {error.message}"] += 1
        except AssertionError as error:
            report.violations.append(f"stream {number}: {error}")
        report.num_tokens += sum(len(tokens) for tokens in check.tokens)
        if stream.finished is not None:
            report.num_retried += stream.finished.phases.num_attempts > 1
        self._check_tokens(number, check.result, self._expected[request], stream.finished is not None)
        if time.monotonic() - begin > request.timeout_s + END_MARGIN_S:
            report.violations.append(f"stream {number} ended {time.monotonic() - begin:.1f} s after its begin")

    def _check_tokens(self, number: int, tokens: Tokens, expected: Tokens, has_finished: bool) -> None:
        if has_finished and tokens != expected:
            self.report.violations.append(f"stream {number} has finished with other tokens than without faults")
        if any(known != right[: len(known)] for known, right in zip(tokens, expected, strict=True)):
            self.report.violations.append(f"stream {number} has begun with other tokens than without faults")


def make_requests(seed: int, num_tokens: int) -> list[Request]:
    return [
        make_request(
            seed * 1000 + number,
            8 + number * 7 % 90,
            num_tokens=1 + number * 13 % num_tokens if number % 4 else num_tokens,
            num_sequences=1 + (number % 10 == 9),
            resumable=True,
            timeout_s=REQUEST_TIMEOUT_S,
        )
        for number in range(NUM_DIFFERENT_REQUESTS)
    ]


async def random_faults(
    num_streams: int = 2000, num_clients: int = 8, num_tokens: int = 120, seed: int = 1, secured: bool = False
) -> dict[str, Any]:
    """Streams under random faults of all kinds; counts violations of I1 to I7."""
    async with FaultCluster(
        num_gateways=2, num_prefill=2, num_decode=2, requests=REQUEST_SETTINGS, engine=ENGINE, secured=secured
    ) as cluster:
        async with cluster.client() as client:
            expected = await fault_free_tokens(client, make_requests(seed, num_tokens), num_clients)
        storm, streams = FaultStorm(cluster, seed), Streams(cluster, expected, seed)
        await streams.run(num_clients, NUM_WARM_UP_STREAMS)
        await cluster.check()
        await cluster.take_baseline()
        begin = time.monotonic()
        await run_beside(storm, streams.run(num_clients, num_streams), streams.report)
        duration_s = time.monotonic() - begin
        history = cluster.state_watch.history
        await check_end(cluster, streams.report)
    return {
        **streams.report.figures(),
        **storm_figures(storm),
        "moves": history.num_moves,
        "seconds": round(duration_s, 1),
    }


async def run_beside(storm: FaultStorm, load: Coroutine[Any, Any, None], report: StreamReport) -> None:
    """Runs the load under the storm. A cluster that stays broken ends both."""
    raging, loading = asyncio.ensure_future(storm.run()), asyncio.ensure_future(load)
    try:
        await asyncio.wait([raging, loading], return_when=asyncio.FIRST_COMPLETED)
        if raging.done():
            raging.result()
        await loading
        await _cancel(raging)
        await storm.make_whole()
    except AssertionError as error:
        report.violations.append(f"not whole after a fault: {error}")
    finally:
        await _cancel(raging, loading)


async def _cancel(*tasks: "asyncio.Future[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def check_end(cluster: FaultCluster, report: StreamReport) -> None:
    """Adds what is left to the violations."""
    try:
        await cluster.check(REQUEST_TIMEOUT_S + AT_REST_MARGIN_S)
    except AssertionError as error:
        report.violations.append(str(error))


def storm_figures(storm: FaultStorm) -> dict[str, Any]:
    return {
        "faults": sum(storm.fired.values()),
        "faults_by_kind": {kind: storm.fired[kind] for kind in KINDS},
        "faults_that_hit_nothing": sum(storm.missed.values()),
    }
