"""The workers from which the first token is expected soonest. Pure.

Costs are the prompt tokens that the fastest prefill worker computes meanwhile:

    decode worker    (queue + uncached) x how much slower it is
    prefill worker   the same, handoff, and KV to send

Where nothing is cached, the choice is that by load.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.routing.candidates import Candidates, candidates_for
from gateway.routing.conditional_disaggregation import (
    HANDOFF_TOKENS,
    LONG_PROMPT_SLOWDOWN,
    SHORT_PROMPT_TOKENS,
    SLOWDOWN,
)
from gateway.routing.router import Assignment, RouteQuery, WorkerView, choose_workers, decode_cost, prefill_cost
from gateway.routing.strategies.two_choices import two_of

JOB_TOKENS = 16
"""Delay by another job in a decode worker's batch."""
TRANSFERS_PER_TOKEN = 10
"""Tokens whose KV is sent while one is computed."""
NEAR_TOKENS = 32
NEAR_SHARE = 0.1
"""What costs up to so much more than the best is as good, for loads are known late."""


class PrefixStrategy:
    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw

    def choose(self, workers: Sequence[WorkerView], query: RouteQuery) -> Assignment | None:
        candidates = candidates_for(workers, query)
        if not any(each.worker_id in query.cached_tokens for each in (*candidates.decode, *candidates.prefill)):
            return choose_workers(workers, query)
        costs = _Costs(query, _best_rate(candidates))
        first_token = costs.first_token(candidates)
        return candidates.assign(
            lambda decode: min(self._near_best(decode, first_token), key=lambda worker: decode_cost(worker, query)),
            lambda prefill: min(
                self._near_best(prefill, {each.worker_id: costs.computing(each) for each in prefill}),
                key=prefill_cost(prefill, query),
            ),
        )

    def _near_best(self, workers: Sequence[WorkerView], costs: Mapping[str, float]) -> Sequence[WorkerView]:
        """Two at random, so that gateways that see the same do not all choose the same."""
        best = min(costs[each.worker_id] for each in workers)
        bound = best * (1 + NEAR_SHARE) + NEAR_TOKENS
        return two_of([each for each in workers if costs[each.worker_id] <= bound], self._draw)


def _best_rate(candidates: Candidates) -> float:
    """0 before the first measurement."""
    return max((each.load.prefill_tokens_per_s for each in candidates.prefill or candidates.decode), default=0.0)


@dataclass(frozen=True, slots=True)
class _Costs:
    query: RouteQuery
    best_rate: float

    def first_token(self, candidates: Candidates) -> dict[str, float]:
        """By decode worker, each with its best prefill worker."""
        by_cost = replace(candidates, prefill=sorted(candidates.prefill, key=self.computing))
        costs: dict[str, float] = {}
        for worker in candidates.decode:
            num_jobs = worker.load.num_running + worker.load.num_waiting + worker.num_assigned
            cost = self._computing_locally(worker, has_others=num_jobs > 0)
            for peer in by_cost.peers_of(worker)[:1]:
                num_sent = self._num_uncached(worker)
                cost = min(cost, self.computing(peer) + HANDOFF_TOKENS + num_sent / TRANSFERS_PER_TOKEN)
            costs[worker.worker_id] = cost + num_jobs * JOB_TOKENS
        return costs

    def computing(self, worker: WorkerView) -> float:
        return self._num_before(worker) * self._slowness(worker.load.prefill_tokens_per_s, 1.0)

    def _computing_locally(self, worker: WorkerView, *, has_others: bool) -> float:
        is_long = has_others and self._num_uncached(worker) > SHORT_PROMPT_TOKENS
        rate = worker.load.prefill_tokens_per_s
        if has_others:
            rate = worker.load.shared_prefill_tokens_per_s or (0.0 if is_long else rate)
        return self._num_before(worker) * self._slowness(rate, LONG_PROMPT_SLOWDOWN if is_long else SLOWDOWN)

    def _slowness(self, rate: float, unmeasured: float) -> float:
        return self.best_rate / rate if rate and self.best_rate else unmeasured

    def _num_before(self, worker: WorkerView) -> int:
        return worker.load.num_queued_prompt_tokens + worker.num_assigned_tokens + self._num_uncached(worker)

    def _num_uncached(self, worker: WorkerView) -> int:
        return self.query.num_tokens - self.query.cached_tokens.get(worker.worker_id, 0)
