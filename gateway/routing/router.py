"""Chooses the workers of a job. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvrelay.core.job import WorkerLoad
from kvrelay.core.member import MemberRole
from kvrelay.core.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class WorkerView:
    worker_id: str
    role: MemberRole
    address: str
    model: ModelSpec
    block_size: int
    max_sequence_tokens: int
    load: WorkerLoad
    num_assigned: int = 0
    """Jobs since its last load report."""
    num_assigned_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RouteQuery:
    fingerprint: str
    num_tokens: int
    excluded_worker_ids: frozenset[str] = frozenset()
    avoided_pairs: frozenset[tuple[str, str]] = frozenset()
    """(decode, prefill) worker."""
    preferred_decode_worker_id: str | None = None
    """Probably caches the prompt's beginning."""
    on_one_worker: bool = False
    """The decode worker must compute the prompt."""
    token_ids: Sequence[int] = ()
    cache_salt: str = ""
    session_key: str = ""
    """The client's, for what belongs together."""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Leading tokens that are probably cached, by worker."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Without a prefill worker, the decode worker computes the prompt."""

    decode_worker_id: str
    prefill_worker_id: str | None


def choose_workers(workers: Iterable[WorkerView], query: RouteQuery) -> Assignment | None:
    """Returns None without a decode worker."""
    candidates = [worker for worker in workers if is_candidate(worker, query)]
    decode_workers = [worker for worker in candidates if worker.role is MemberRole.DECODE]
    prefill_workers = [worker for worker in candidates if worker.role is MemberRole.PREFILL and not query.on_one_worker]
    if not decode_workers:
        return None
    with_peers = {
        worker.worker_id
        for worker in decode_workers
        if any((worker.worker_id, peer.worker_id) not in query.avoided_pairs for peer in prefill_workers)
    }
    decode_worker = min(
        decode_workers, key=lambda worker: decode_cost(worker, query, has_peer=worker.worker_id in with_peers)
    )
    peers = [
        worker for worker in prefill_workers if (decode_worker.worker_id, worker.worker_id) not in query.avoided_pairs
    ]
    prefill_worker = min(peers, key=prefill_cost(peers, query), default=None)
    return Assignment(decode_worker.worker_id, prefill_worker.worker_id if prefill_worker else None)


def is_candidate(worker: WorkerView, query: RouteQuery) -> bool:
    return (
        worker.model.fingerprint == query.fingerprint
        and not worker.load.draining
        and worker.worker_id not in query.excluded_worker_ids
        and query.num_tokens < worker.max_sequence_tokens
    )


def decode_cost(worker: WorkerView, query: RouteQuery, *, has_peer: bool = True) -> tuple[object, ...]:
    """Lower is better."""
    load = worker.load
    num_blocks_left = _num_blocks_left(worker, query)
    num_jobs = load.num_running + load.num_waiting + worker.num_assigned
    return (
        num_blocks_left < 0,
        not has_peer,
        worker.worker_id != query.preferred_decode_worker_id,
        num_jobs,
        -num_blocks_left,
        worker.num_assigned,
        worker.worker_id,
    )


def prefill_cost(workers: Sequence[WorkerView], query: RouteQuery) -> Callable[[WorkerView], tuple[object, ...]]:
    """Lower is better. A worker without a rate counts as the best of `workers`, so that it gets one."""
    best_rate = max((worker.load.prefill_tokens_per_s for worker in workers), default=0.0) or 1.0

    def cost(worker: WorkerView) -> tuple[object, ...]:
        num_tokens = worker.load.num_queued_prompt_tokens + worker.num_assigned_tokens + query.num_tokens
        rate = worker.load.prefill_tokens_per_s
        return (
            num_tokens / (rate or best_rate),
            rate > 0.0,
            worker.load.num_waiting + worker.num_assigned,
            worker.worker_id,
        )

    return cost


def has_room(worker: WorkerView, query: RouteQuery) -> bool:
    return _num_blocks_left(worker, query) >= 0


def _num_blocks_left(worker: WorkerView, query: RouteQuery) -> int:
    num_needed = -(-(query.num_tokens + worker.num_assigned_tokens) // worker.block_size)
    return worker.load.num_free_blocks + worker.load.num_cached_blocks - num_needed
