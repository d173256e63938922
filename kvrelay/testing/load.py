"""Runs requests on a broken cluster, and compares tokens with those of a whole one (I1, I2)."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvrelay.client import AsyncClient, Delta
from kvrelay.errors import KvrelayError
from kvrelay.testing.tiny_model import SPECIAL_TOKENS, VOCAB_SIZE

Tokens = tuple[tuple[int, ...], ...]
"""Token ids of each sequence."""
Connect = Callable[[Sequence[str]], AsyncClient]
"""Makes a client of gateways' addresses."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of known output length. `seed` None is greedy."""

    prompt: tuple[int, ...]
    num_tokens: int = 24
    seed: int | None = None
    num_sequences: int = 1
    tenant: str = ""
    resumable: bool = False
    timeout_s: float = 60.0

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `AsyncClient.generate`."""
        sampling: dict[str, Any] = (
            {"temperature": 0.0} if self.seed is None else {"temperature": 1.0, "seed": self.seed}
        )
        sampling |= {"max_tokens": self.num_tokens, "ignore_eos": True, "n": self.num_sequences}
        ways = {"tenant": self.tenant, "resumable": self.resumable, "timeout_s": self.timeout_s}
        return {"token_ids": list(self.prompt), **ways, **sampling}


def make_request(number: int, prompt_tokens: int = 40, **changes: Any) -> Request:
    """Endless different requests by number: even ones greedy, odd ones seeded."""
    generator = random.Random(number)
    prompt = tuple(generator.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(prompt_tokens))
    return Request(prompt, **{"seed": number if number % 2 else None, "tenant": f"tenant-{number}", **changes})


class TokenCheck:
    """Checks that each index of each sequence comes once and in order (I1)."""

    def __init__(self, num_sequences: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_sequences)]

    def take(self, delta: Delta) -> None:
        known = self.tokens[delta.sequence]
        if delta.tokens:
            assert delta.index == len(known), (
                f"index {delta.index} of sequence {delta.sequence} came after {len(known)} tokens"
            )
        known += [token.token_id for token in delta.tokens]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def result(self) -> Tokens:
        return tuple(tuple(tokens) for tokens in self.tokens)


@dataclass(frozen=True, slots=True)
class Outcome:
    request: Request
    tokens: Tokens
    error: KvrelayError | AssertionError | None
    num_attempts: int
    duration_s: float
    longest_pause_s: float
    request_id: str | None = None
    """None if it was never accepted."""


async def run_request(client: AsyncClient, request: Request, check: TokenCheck | None = None) -> Outcome:
    """`check` shows the tokens so far."""
    check = check or TokenCheck(request.num_sequences)
    begin = last = time.monotonic()
    pause_s = 0.0
    error: KvrelayError | AssertionError | None = None
    stream = client.generate(**request.options)
    try:
        async for delta in stream:
            check.take(delta)
            now = time.monotonic()
            pause_s, last = max(pause_s, now - last), now
    except (KvrelayError, AssertionError) as failure:
        error = failure
    pause_s = max(pause_s, time.monotonic() - last)
    num_attempts = stream.finished.phases.num_attempts if stream.finished is not None else 0
    request_id = stream.accepted.request_id if stream.accepted is not None else None
    return Outcome(request, check.result, error, num_attempts, time.monotonic() - begin, pause_s, request_id)


async def fault_free_tokens(
    client: AsyncClient, requests: Iterable[Request], concurrency: int = 4
) -> dict[Request, Tokens]:
    """Each request's tokens when nothing fails."""
    tokens: dict[Request, Tokens] = {}
    waiting = list(dict.fromkeys(requests))

    async def job() -> None:
        while waiting:
            request = waiting.pop()
            # As another tenant, so that the later request finds nothing of it in a cache.
            outcome = await run_request(client, replace(request, tenant=f"undisturbed {request.tenant}"))
            assert outcome.error is None, f"without a fault: {outcome.error!r}"
            tokens[request] = outcome.tokens

    await asyncio.gather(*(job() for _ in range(concurrency)))
    return tokens


@dataclass(slots=True)
class LoadReport:
    """The outcomes of a load."""

    outcomes: list[Outcome] = field(default_factory=list)
    wrong: list[Outcome] = field(default_factory=list)
    """Succeeded with other tokens than without a fault."""

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    @property
    def num_retried(self) -> int:
        """Requests with more than one attempt."""
        return sum(outcome.num_attempts > 1 for outcome in self.outcomes)

    @property
    def num_attempts(self) -> int:
        return sum(outcome.num_attempts for outcome in self.outcomes)

    @property
    def longest_pause_s(self) -> float:
        """Before, between or after deltas."""
        return max((outcome.longest_pause_s for outcome in self.outcomes), default=0.0)

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        errors = Counter(f"{type(outcome.error).__name__}: {outcome.error}" for outcome in self.failed)
        return {
            "requests": len(self.outcomes),
            "failed": len(self.failed),
            "wrong": len(self.wrong),
            "retried": self.num_retried,
            "attempts": self.num_attempts,
            "longest_pause_s": round(self.longest_pause_s, 2),
            "errors": dict(errors),
        }

    def check(self) -> None:
        """Raises AssertionError unless all succeeded with the right tokens."""
        assert not self.failed, f"{self.figures()}: {self.failed[0].error!r}"
        assert not self.wrong, f"{self.figures()}"


async def run_load(
    addresses: Sequence[str],
    requests: Sequence[Request],
    expected: Mapping[Request, Tokens],
    num_clients: int,
    connect: Connect = AsyncClient,
) -> LoadReport:
    """Shares requests between `num_clients` clients, and compares every output.

    `expected` comes from `fault_free_tokens`. Each client begins with another address. A secured
    cluster needs `connect=cluster.connect`.
    """
    report = LoadReport()
    waiting = list(reversed(requests))

    async def run_client(number: int) -> None:
        own = list(addresses[number % len(addresses) :]) + list(addresses[: number % len(addresses)])
        async with connect(own) as client:
            while waiting:
                outcome = await run_request(client, waiting.pop())
                report.outcomes.append(outcome)
                if outcome.error is None and outcome.tokens != expected[outcome.request]:
                    report.wrong.append(outcome)

    await asyncio.gather(*(run_client(number) for number in range(num_clients)))
    return report
