"""Finds out in confined children whether a response format compiles within bounds.

    quick child --longer than most formats--> slow child --over its limits--> refused

So a format that takes long delays only its like. One that has passed costs about the same when it
is compiled again in a thread.
"""

import json
from collections import Counter
from dataclasses import dataclass

from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.runtime.confined_child import Confinement, Limit, OverLimitError
from kvrelay.runtime.confined_pool import ConfinedPool
from kvrelay.runtime.single_flight_cache import SingleFlightCache

MAX_KEPT = 256
QUICK_CPU_MS = 250
CPU_MS = 2000
WALL_MS = 20_000
MEMORY_MIB = 512
MAX_ANSWER_BYTES = 64 * 1024
OUTCOMES = ("accepted", "refused", *(limit.value for limit in Limit))

_MODULE = "kvrelay.structured_output.format_child"
QUICK = Confinement(_MODULE, QUICK_CPU_MS, WALL_MS, MEMORY_MIB << 20, niceness=5)
SLOW = Confinement(_MODULE, CPU_MS, WALL_MS, MEMORY_MIB << 20, niceness=10)


@dataclass(frozen=True, slots=True)
class Verdict:
    problem: str | None
    """None: it compiles."""
    num_bytes: int = 0


class FormatChecks:
    """Used on one event loop. Keeps the last verdicts, also of formats that it refused."""

    def __init__(
        self, quick: ConfinedPool | None = None, slow: ConfinedPool | None = None, *, max_kept: int = MAX_KEPT
    ) -> None:
        self.quick = quick or ConfinedPool("the check of response formats", QUICK)
        self.slow = slow or ConfinedPool("the check of slow response formats", SLOW, num_children=1)
        self.outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        """Of formats that were not kept."""
        self._verdicts: SingleFlightCache[ResponseFormat, Verdict] = SingleFlightCache(
            self._find_verdict, max_kept, "check of a response format"
        )

    def __contains__(self, response_format: ResponseFormat) -> bool:
        """Whether a check costs nothing more."""
        return response_format in self._verdicts

    async def check(self, response_format: ResponseFormat) -> int:
        """Compiles the format in a child, unless its verdict is known.

        Returns about how many bytes a compiled one takes.

        Raises:
            InvalidRequestError: the format is wrong, or takes too much to compile.
            OverloadedError: too many formats are being checked.
            UnavailableError: no process starts.
        """
        response_format.validate()
        verdict = await self._verdicts.get(response_format)
        if verdict.problem is not None:
            raise InvalidRequestError(response_format.field, verdict.problem)
        return verdict.num_bytes

    async def close(self) -> None:
        await self.quick.close()
        await self.slow.close()

    @property
    def num_children_started(self) -> int:
        return self.quick.num_started + self.slow.num_started

    async def _find_verdict(self, response_format: ResponseFormat) -> Verdict:
        request = json.dumps({"kind": response_format.kind.value, "source": response_format.source}).encode()
        try:
            answer = json.loads(await self._ask(request))
        except OverLimitError as over:
            self.outcomes[over.limit.value] += 1
            return Verdict(
                f"takes {_too_much(over.limit)} to compile; make it simpler, above all patterns and counted repetitions"
            )
        verdict = Verdict(answer["problem"], answer["num_bytes"])
        self.outcomes["accepted" if verdict.problem is None else "refused"] += 1
        return verdict

    async def _ask(self, request: bytes) -> bytes:
        try:
            return await self.quick.ask(request, MAX_ANSWER_BYTES)
        except OverLimitError as over:
            if over.limit is not Limit.TIME:
                raise
        return await self.slow.ask(request, MAX_ANSWER_BYTES)


def _too_much(limit: Limit) -> str:
    if limit is Limit.TIME:
        return f"more than {CPU_MS / 1000:g} s of processor time"
    return f"more than {MEMORY_MIB} MiB of memory"
