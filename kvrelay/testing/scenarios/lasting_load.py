"""A load that lasts as long as the faults. New tenants keep repeated requests out of caches."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError, OverloadedError
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.load import (
    LoadReport,
    Outcome,
    Request,
    TokenCheck,
    Tokens,
    fault_free_tokens,
    make_request,
    run_request,
)

REQUEST_SETTINGS = {"local_prefill_tokens": 0, "worker_wait_ms": 60_000}
ENGINE = {"num_kv_blocks": 512}
NUM_READERS = 8


def make_requests(
    number: int, *, num_tokens: int, resumable: bool | None = False, timeout_s: float = 120.0
) -> list[Request]:
    """Even ones are greedy, every tenth has two sequences. `resumable` None: two of three are."""
    return [
        make_request(
            each,
            30 + each % 70,
            num_tokens=num_tokens,
            num_sequences=1 + (each % 10 == 9),
            resumable=each % 3 > 0 if resumable is None else resumable,
            timeout_s=timeout_s,
        )
        for each in range(number)
    ]


@dataclass(slots=True)
class LastingLoad:
    """Clients that send different `requests` again and again."""

    cluster: FaultCluster
    requests: Sequence[Request]
    num_clients: int
    report: LoadReport = field(default_factory=LoadReport, init=False)
    duration_s: float = field(default=0.0, init=False)
    tenants_waiting: set[str] = field(default_factory=set, init=False)
    """Tenants of running requests; each has one."""

    async def run(self, harm: Callable[[], Awaitable[None]]) -> LoadReport:
        """Runs all requests without a fault, then repeats them until `harm` ends."""
        async with self.cluster.client() as client:
            expected = await fault_free_tokens(client, self.requests, self.num_clients)
        await self.cluster.check()
        await self.cluster.take_baseline()
        begin = time.monotonic()
        harming = asyncio.ensure_future(harm())
        supply = self._supply()
        clients = [
            asyncio.ensure_future(self._run_client(each, supply, expected, harming)) for each in range(self.num_clients)
        ]
        try:
            await asyncio.gather(harming, *clients)
        finally:
            for task in (harming, *clients):
                task.cancel()
            await asyncio.gather(harming, *clients, return_exceptions=True)
            self.duration_s = time.monotonic() - begin
        return self.report

    def figures(self) -> dict[str, Any]:
        return {**self.report.figures(), "seconds": round(self.duration_s, 1), "_report": self.report}

    def _supply(self) -> Iterator[tuple[Request, Request]]:
        """Pairs of a known request and the one to send."""
        for round_number in itertools.count():
            for request in self.requests:
                yield request, replace(request, tenant=f"{request.tenant} in round {round_number}")

    async def _run_client(
        self,
        number: int,
        supply: Iterator[tuple[Request, Request]],
        expected: Mapping[Request, Tokens],
        harming: "asyncio.Future[None]",
    ) -> None:
        addresses = self.cluster.addresses
        first = number % len(addresses)
        async with self.cluster.connect([*addresses[first:], *addresses[:first]]) as client:
            while not harming.done():
                known, sent = next(supply)
                self.tenants_waiting.add(sent.tenant)
                outcome = await run_request(client, sent)
                self.tenants_waiting.discard(sent.tenant)
                self.report.outcomes.append(outcome)
                if outcome.error is None and outcome.tokens != expected[known]:
                    self.report.wrong.append(outcome)
                if isinstance(outcome.error, OverloadedError):
                    await asyncio.sleep(outcome.error.retry_after_ms / 1000)


async def compare_stored(cluster: FaultCluster, report: LoadReport, *, all_are_kept: bool = False) -> dict[str, Any]:
    """Restarts all gateways, and counts outputs that Redis has right (`stored`).

    Only outputs of resumable requests are kept, unless gateways run with --keep-outputs.
    """
    for gateway in cluster.of_role("gateway"):
        await gateway.terminate()
        await gateway.start_again()
    await cluster.wait_until_ready()
    succeeded = [outcome for outcome in report.outcomes if outcome.error is None]
    waiting = [outcome for outcome in succeeded if all_are_kept or outcome.request.resumable]
    found = {"stored": 0, "stored_wrong": 0, "not_stored": 0}
    errors: Counter[str] = Counter()

    async def read(client: AsyncClient) -> None:
        while waiting:
            outcome = waiting.pop()
            try:
                tokens = await _stored_tokens(client, outcome)
            except KvrelayError as error:
                found["not_stored"] += 1
                errors[f"{type(error).__name__}: {error.message}"] += 1
                continue
            found["stored" if tokens == outcome.tokens else "stored_wrong"] += 1

    async with cluster.client() as client:
        await asyncio.gather(*(read(client) for _ in range(NUM_READERS)))
    return {**found, "errors_of_not_stored": dict(errors)} if errors else found


async def _stored_tokens(client: AsyncClient, outcome: Outcome) -> Tokens:
    assert outcome.request_id is not None, "it succeeded, so it was accepted"
    check = TokenCheck(outcome.request.num_sequences)
    async for delta in client.resume(outcome.request_id, timeout_s=30.0):
        check.take(delta)
    return check.result
