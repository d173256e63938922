"""A gateway's choice of workers: the strategy, and what it knows of their caches. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gateway.routing.cache_hits import CacheHits
from gateway.routing.candidates import Strategy
from gateway.routing.prefix_index import MAX_ENTRIES, PrefixIndex
from gateway.routing.router import Assignment, RouteQuery, WorkerView
from gateway.routing.strategies.load import LoadStrategy
from gateway.routing.strategies.prefix_affinity import PrefixStrategy
from gateway.routing.strategies.round_robin import RoundRobinStrategy
from gateway.routing.strategies.session_affinity import SessionStrategy
from gateway.routing.strategies.two_choices import TwoChoicesStrategy
from kvrelay.core.job import CacheChanges
from kvrelay.core.member import MemberRole

STRATEGIES: dict[str, Callable[[Callable[[], float]], Strategy]] = {
    "prefix": PrefixStrategy,
    "load": lambda draw: LoadStrategy(),
    "two-choices": TwoChoicesStrategy,
    "round-robin": lambda draw: RoundRobinStrategy(),
    "session": lambda draw: SessionStrategy(),
}
"""By the name of `--routing`; each gets a source of numbers in [0, 1)."""


class Routing:
    def __init__(self, strategy: str, draw: Callable[[], float], max_entries: int | None = None) -> None:
        self.strategy = strategy
        self.index = PrefixIndex(max_entries or MAX_ENTRIES) if strategy == "prefix" else None
        self.hits = CacheHits()
        self._strategy = STRATEGIES[strategy](draw)

    @property
    def wants_cache_changes(self) -> bool:
        return self.index is not None

    @property
    def num_index_entries(self) -> int:
        return 0 if self.index is None else self.index.num_entries

    def choose(self, workers: Sequence[WorkerView], query: RouteQuery, request_id: str) -> Assignment | None:
        if self.index is not None:
            block_sizes = {
                each.worker_id: each.block_size for each in workers if each.model.fingerprint == query.fingerprint
            }
            cached = self.index.cached_tokens(block_sizes, query.token_ids, query.cache_salt)
            query = replace(query, cached_tokens=cached)
        assignment = self._strategy.choose(workers, query)
        if assignment is not None:
            chosen = (assignment.decode_worker_id, assignment.prefill_worker_id)
            expected = {worker_id: query.cached_tokens.get(worker_id, 0) for worker_id in chosen if worker_id}
            self.hits.expect(request_id, query.num_tokens, expected)
        return assignment

    def on_cache_changes(self, worker_id: str, changes: CacheChanges) -> None:
        if self.index is not None:
            self.index.apply(worker_id, changes)

    def on_cached(self, request_id: str, role: MemberRole, worker_id: str, num_cached_tokens: int) -> None:
        """A worker says how many leading tokens its cache had."""
        self.hits.on_found(request_id, role, worker_id, num_cached_tokens)

    def on_worker_lost(self, worker_id: str) -> None:
        if self.index is not None:
            self.index.forget(worker_id)
