"""In which order the engines are measured: workload by workload within a round, every engine once,
another one first each time.

What changes on the machine over minutes so falls on all engines alike. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.peers.catalogue import Peer


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine's turn at one workload in one round."""

    round_number: int
    workload: str
    peer: Peer


def turns(peers: Sequence[Peer], workloads: Sequence[str], num_rounds: int) -> Iterator[Turn]:
    """All turns in order; only of workloads that the peer takes part in."""
    number = 0
    for round_number in range(num_rounds):
        for workload in workloads:
            ready = [peer for peer in peers if workload in peer.workloads]
            for place in range(len(ready)):
                yield Turn(round_number, workload, ready[(place + number) % len(ready)])
            number += 1
