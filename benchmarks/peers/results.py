"""The results of a comparison: spreads over the rounds, and ratios to kvrelay round by round. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.measures import HIGHER_IS_BETTER
from benchmarks.statistics import Spread, spread

PEERS_BY_NAME: Mapping[str, Peer] = {peer.name: peer for peer in PEERS}


@dataclass(frozen=True, slots=True)
class Result:
    """One measure of one peer on so many threads."""

    peer: str
    title: str
    version: str
    weights: str
    num_threads: int
    run: str
    measure: str
    values: tuple[float, ...]
    """One per round, in their order."""
    spread: Spread


def make_results(
    values: Mapping[tuple[str, int, str, str], Sequence[float]], versions: Mapping[str, str]
) -> list[Result]:
    """Results of values by peer, threads, run and measure."""
    return [
        Result(
            name, PEERS_BY_NAME[name].title, versions[name], PEERS_BY_NAME[name].weights, num_threads, run, measure,
            tuple(each), spread(each),
        )
        for (name, num_threads, run, measure), each in values.items()
    ]  # fmt: skip


def find(results: Sequence[Result], peer: str, run: str, measure: str) -> Result | None:
    """The result of this peer among those of one number of threads, if there is one."""
    return next((each for each in results if (each.peer, each.run, each.measure) == (peer, run, measure)), None)


def advantage(ours: Result, theirs: Result) -> Spread:
    """How many times better ours is than theirs, round by round: above 1 we are ahead, be the
    measure a rate or a time.

    Rounds that one of them has no value of are left out; both must have at least one.
    """
    pairs = zip(ours.values, theirs.values, strict=False)
    if ours.measure in HIGHER_IS_BETTER:
        return spread([our / their for our, their in pairs])
    return spread([their / our for our, their in pairs])
