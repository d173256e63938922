"""What is asked of a cluster and when: lengths of prompts and outputs, and times of arrival, all
from one seed.

    128->64                          prompts of 128 tokens, 64 new ones
    64..256->32..64                  uniform between the two, both ends included
    90%:128->64,10%:2048->32         a mix, by share of the requests

Knows no cluster.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.errors import ConfigError

PROMPT_TOKEN_IDS = range(300, 10_000)
"""Below any vocabulary's end and above where special tokens lie; prompts are random so that no
prefix cache shortens them.
"""

_PART = re.compile(r"(?:(?P<share>\d+(?:\.\d+)?)%:)?(?P<prompt>\d+(?:\.\.\d+)?)->(?P<output>\d+(?:\.\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A range of lengths in tokens, both ends included."""

    least: int
    most: int

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.least, self.most)

    def text(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"


@dataclass(frozen=True, slots=True)
class WorkloadPart:
    """One kind of request, and its weight among all."""

    weight: float
    prompt: Lengths
    output: Lengths

    @property
    def name(self) -> str:
        return f"{self.prompt.text()}->{self.output.text()}"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: when it is sent, in seconds from the load's begin; in a closed loop, None: when
    there is room.
    """

    kind: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    at_s: float | None = None


def parse_workload(text: str) -> tuple[WorkloadPart, ...]:
    """The parts of a workload.

    Raises:
        ConfigError: the text is none.
    """
    parts = []
    for item in text.split(","):
        match = _PART.fullmatch(item.strip())
        if match is None:
            raise ConfigError(
                f"workload {item!r} is none: write it as 128->64, 64..256->32..64 or 90%:128->64,10%:2048->32"
            )
        weight = float(match["share"]) if match["share"] else 100.0
        parts.append(WorkloadPart(weight, _lengths(match["prompt"]), _lengths(match["output"])))
    return tuple(parts)


def plan_requests(
    workload: Sequence[WorkloadPart], num_requests: int, seed: int, requests_per_s: float | None = None
) -> list[PlannedRequest]:
    """Requests in the order of their arrival.

    Args:
        workload: the kinds of requests.
        num_requests: how many.
        seed: the same seed gives the same requests at the same times, scaled with the rate.
        requests_per_s: of a Poisson process; None for a closed loop.
    """
    chance = random.Random(seed)
    weights = [part.weight for part in workload]
    at_s = 0.0
    planned = []
    for _ in range(num_requests):
        (part,) = chance.choices(workload, weights)
        wait = chance.expovariate(1.0)
        prompt = tuple(chance.choices(PROMPT_TOKEN_IDS, k=part.prompt.draw(chance)))
        output = part.output.draw(chance)
        planned.append(PlannedRequest(part.name, prompt, output, at_s if requests_per_s else None))
        at_s += wait / requests_per_s if requests_per_s else 0.0
    return planned


def _lengths(text: str) -> Lengths:
    least, _, most = text.partition("..")
    lengths = Lengths(int(least), int(most or least))
    if not 1 <= lengths.least <= lengths.most:
        raise ConfigError(f"lengths {text!r} are none: they begin with 1, and the second is not less than the first")
    return lengths
