"""Workers among which every strategy chooses: those with room and peers, if there are any. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.routing.router import Assignment, RouteQuery, WorkerView, has_room, is_candidate
from kvrelay.core.member import MemberRole


class Strategy(Protocol):
    def choose(self, workers: Sequence[WorkerView], query: RouteQuery) -> Assignment | None:
        """Returns None without a decode worker."""


@dataclass(frozen=True, slots=True)
class Candidates:
    decode: Sequence[WorkerView]
    prefill: Sequence[WorkerView]
    avoided_pairs: frozenset[tuple[str, str]]

    def peers_of(self, decode_worker: WorkerView) -> list[WorkerView]:
        """Prefill workers that may push to it."""
        if not self.avoided_pairs:
            return list(self.prefill)
        return [peer for peer in self.prefill if (decode_worker.worker_id, peer.worker_id) not in self.avoided_pairs]

    def assign(
        self,
        pick_decode: Callable[[Sequence[WorkerView]], WorkerView],
        pick_prefill: Callable[[Sequence[WorkerView]], WorkerView],
    ) -> Assignment | None:
        if not self.decode:
            return None
        decode_worker = pick_decode(self.decode)
        peers = self.peers_of(decode_worker)
        return Assignment(decode_worker.worker_id, pick_prefill(peers).worker_id if peers else None)


def candidates_for(workers: Iterable[WorkerView], query: RouteQuery) -> Candidates:
    fitting = [worker for worker in workers if is_candidate(worker, query)]
    decode = [worker for worker in fitting if worker.role is MemberRole.DECODE]
    prefill = [worker for worker in fitting if worker.role is MemberRole.PREFILL and not query.on_one_worker]
    candidates = Candidates(decode, prefill, query.avoided_pairs)
    rank = {each.worker_id: (not has_room(each, query), not candidates.peers_of(each)) for each in decode}
    best = min(rank.values(), default=None)
    return Candidates([each for each in decode if rank[each.worker_id] == best], prefill, query.avoided_pairs)
