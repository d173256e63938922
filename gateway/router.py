"""Which workers take a work. Pure: a function of what is known of the workers, with no clock and no memory of its own."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvrelay.model_spec import ModelSpec
from kvrelay.work import WorkerLoad
from kvrelay.worker_registry import MemberRole

LONGEST_REST_FACTOR = 8.0
PROBE_S = 2.0
"""How long a probe over a pair that has failed has before others follow it; reaching a worker takes no longer."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What this gateway knows of a worker whose session is up."""

    worker_id: str
    role: MemberRole
    address: str
    model: ModelSpec
    block_size: int
    max_sequence_tokens: int
    load: WorkerLoad
    num_assigned: int = 0
    """Works that this gateway gave it and that its load does not count yet."""
    num_assigned_tokens: int = 0
    """Prompt tokens of those."""


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """What is to be placed."""

    fingerprint: str
    num_tokens: int
    excluded_worker_ids: frozenset[str] = frozenset()
    avoided_pairs: frozenset[tuple[str, str]] = frozenset()
    """(decode, prefill) worker."""
    preferred_decode_worker_id: str | None = None
    """Where the beginning of the prompt is probably cached: a conversation's last worker."""
    on_one_worker: bool = False
    """Whether the decode worker is to compute the prompt too."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The chosen workers; without a prefill worker the decode worker computes the prompt."""

    decode_worker_id: str
    prefill_worker_id: str | None


def choose_workers(workers: Iterable[WorkerView], query: RouteQuery) -> Assignment | None:
    """The best decode worker and, for it, the best prefill worker; None when no decode worker may take the work."""
    candidates = [worker for worker in workers if _may_take(worker, query)]
    decode_workers = [worker for worker in candidates if worker.role is MemberRole.DECODE]
    prefill_workers = [worker for worker in candidates if worker.role is MemberRole.PREFILL and not query.on_one_worker]
    if not decode_workers:
        return None
    with_peers = {
        worker.worker_id
        for worker in decode_workers
        if any((worker.worker_id, peer.worker_id) not in query.avoided_pairs for peer in prefill_workers)
    }
    decode_worker = min(decode_workers, key=lambda worker: _decode_cost(worker, query, has_peer=worker.worker_id in with_peers))
    peers = [worker for worker in prefill_workers if (decode_worker.worker_id, worker.worker_id) not in query.avoided_pairs]
    prefill_worker = min(peers, key=_prefill_cost, default=None)
    return Assignment(decode_worker.worker_id, prefill_worker.worker_id if prefill_worker else None)


def _may_take(worker: WorkerView, query: RouteQuery) -> bool:
    return (
        worker.model.fingerprint == query.fingerprint
        and not worker.load.draining
        and worker.worker_id not in query.excluded_worker_ids
        and query.num_tokens < worker.max_sequence_tokens
    )


def _decode_cost(worker: WorkerView, query: RouteQuery, *, has_peer: bool) -> tuple[object, ...]:
    """Smaller is better: room for the prompt, a prefill worker that reaches it, its beginning cached, the shortest batch, the
    most free blocks.
    """
    load = worker.load
    num_blocks_needed = -(-(query.num_tokens + worker.num_assigned_tokens) // worker.block_size)
    num_blocks_left = load.num_free_blocks + load.num_cached_blocks - num_blocks_needed
    num_works = load.num_running + load.num_waiting + worker.num_assigned
    return (
        num_blocks_left < 0,
        not has_peer,
        worker.worker_id != query.preferred_decode_worker_id,
        num_works,
        -num_blocks_left,
        worker.num_assigned,
        worker.worker_id,
    )


def _prefill_cost(worker: WorkerView) -> tuple[object, ...]:
    num_queued_tokens = worker.load.num_queued_prompt_tokens + worker.num_assigned_tokens
    return (num_queued_tokens, worker.load.num_waiting + worker.num_assigned, worker.worker_id)


class FailedPairs:
    """Pairs of workers between which KV did not travel a moment ago. Times are monotonic seconds, given by the caller.

    A pair that fails again soon after its rest is left alone for longer. When its rest is over, one work goes over it as a probe:
    for the others the rest goes on until that has had time to fail.

    Args:
        rest_s: how long a pair is left alone at first, without the jitter of up to half as much.
        draw: for the jitter, from [0, 1).
    """

    def __init__(self, rest_s: float = 10.0, draw: Callable[[], float] = random.random) -> None:
        self._rest_s = rest_s
        self._draw = draw
        self._rests: dict[tuple[str, str], _Rest] = {}

    def note(self, pair: tuple[str, str], now: float) -> None:
        """(decode, prefill) failed. Works that fail together count once."""
        rest = self._rests.get(pair)
        if rest is not None and now < rest.until and not rest.is_probed:
            return
        factor = 1.0 if rest is None else min(2.0 * rest.factor, LONGEST_REST_FACTOR)
        self._rests[pair] = _Rest(factor, now + self._rest_s * factor * (1.0 + 0.5 * self._draw()))

    def note_used(self, pair: tuple[str, str], now: float) -> None:
        """A work goes over the pair: a probe, if the pair has failed."""
        rest = self._rests.get(pair)
        if rest is not None and not rest.is_probed:
            self._rests[pair] = _Rest(rest.factor, now + PROBE_S, is_probed=True)

    def current(self, now: float) -> frozenset[tuple[str, str]]:
        """Pairs to leave alone now."""
        self._rests = {pair: rest for pair, rest in self._rests.items() if now < rest.until + self._rest_s * rest.factor}
        return frozenset(pair for pair, rest in self._rests.items() if now < rest.until)


@dataclass(frozen=True, slots=True)
class _Rest:
    """Of a pair. It is remembered for a while after its end, so that the next one is longer."""

    factor: float
    until: float
    is_probed: bool = False
