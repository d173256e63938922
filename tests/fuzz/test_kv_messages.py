"""KV pushes that were mutated, replayed or made up: all are refused, no block changes, nothing is
left; good ones go through.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from decode_worker import kv_receiver
from decode_worker.receiving import write_grants
from kvrelay.kv_transfer.shm_fd_passing import RegionClient
from tests.fuzz.kv_mutations import KINDS, BadPush, draw_bad_push
from tests.fuzz.kv_pushes import (
    NUM_BLOCKS,
    SHARED_REGION_BYTES,
    CapturedPush,
    PushOutcome,
    ReceiverBench,
    capture_push,
    make_reservation,
    open_descriptors,
    running_receiver,
)

NUM_RESERVATIONS = 5
NUM_SOURCES = 3
SHARED_RESERVATIONS = (3, 4)
"""Whose pushes go through shared memory."""
BAD_PUSHES_PER_ROUND = 50
MAX_BOMBARDMENTS = 3
GRPC_SHARE = 0.03
"""Of all pushes, which go over a real connection."""


@pytest.fixture
async def receiver() -> AsyncIterator[ReceiverBench]:
    async with running_receiver() as bench:
        yield bench


@dataclass
class Tally:
    """What was sent."""

    num_refused: int = 0
    num_accepted: int = 0
    num_over_grpc: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass
class Captures:
    """Captured pushes: by source of the KV, then by reservation. The stale ones are of an older
    attempt.
    """

    pushes: list[list[CapturedPush]]
    stale: list[CapturedPush]


async def capture_all(client: RegionClient) -> Captures:
    """Has real senders make all pushes."""
    generator = random.Random(0)
    pushes = []
    for source in range(NUM_SOURCES):
        reservations = [
            make_reservation(number, generator.randbytes(16), attempt=2) for number in range(NUM_RESERVATIONS)
        ]
        pushes.append(
            [
                await capture_push(10 * source + number, reservation, client if number in SHARED_RESERVATIONS else None)
                for number, reservation in enumerate(reservations)
            ]
        )
    stale = [
        await capture_push(90 + number, make_reservation(number, generator.randbytes(16)))
        for number in range(NUM_RESERVATIONS)
    ]
    return Captures(pushes, stale)


async def accept(bench: ReceiverBench, push: CapturedPush, over_grpc: bool) -> None:
    """Sends it as it was captured: it is written where it belongs, and nowhere else."""
    blocks = push.reservation.block_ids
    others = [block for block in range(NUM_BLOCKS) if block not in blocks]
    before = bench.kv_of(others)
    bench.open(push.reservation)
    outcome = await bench.push(push.messages, over_grpc=over_grpc)
    assert outcome.error is None, outcome.error
    assert outcome.answers[-1] == "complete"
    assert outcome.ended is not None
    assert outcome.ended.first_tokens is not None
    assert bench.kv_of(blocks) == push.kv
    assert bench.kv_of(others) == before


async def refuse(bench: ReceiverBench, push: CapturedPush, bad: BadPush, over_grpc: bool) -> PushOutcome:
    """Sends it into an open reservation that holds the push's KV already: it is refused, and no
    byte of the pool changes.
    """
    before = bench.pool_digest()
    bench.open(push.reservation)
    if bad.damage is not None:
        flip(push, bad.damage)
    try:
        outcome = await bench.push(bad.messages, over_grpc=over_grpc)
    finally:
        if bad.damage is not None:
            flip(push, bad.damage)
    assert bench.pool_digest() == before, "a block changed"
    assert outcome.error is not None, "accepted"
    assert isinstance(outcome.error, bad.errors), f"refused as {outcome.error!r}"
    assert len(outcome.error.message) > 10
    assert "complete" not in outcome.answers
    if outcome.ended is not None:
        assert outcome.ended.first_tokens is None, "the engine was told that it may go on"
        assert len(bench.grants) == 0
    assert bench.grants.revoke(push.reservation.job.job_id), "somebody still writes"
    assert len(bench.grants) == 0
    return outcome


def flip(push: CapturedPush, damage: tuple[int, int]) -> None:
    assert push.region is not None
    position, bits = damage
    push.region.buffer[position] ^= bits


async def bombard(bench: ReceiverBench, captures: Captures, seed: int, num_bad: int) -> Tally:
    """Bad pushes, with good ones before each round of them and behind the last."""
    tally = Tally()
    generator = random.Random(seed)
    while True:
        pushes = captures.pushes[generator.randrange(NUM_SOURCES)]
        for push in pushes:
            over_grpc = generator.random() < GRPC_SHARE
            await accept(bench, push, over_grpc)
            tally.num_accepted += 1
        if tally.num_refused >= num_bad:
            return tally
        for _ in range(BAD_PUSHES_PER_ROUND):
            number = generator.randrange(NUM_RESERVATIONS)
            push, other = pushes[number], pushes[(number + 1) % NUM_RESERVATIONS]
            case_seed = generator.randrange(2**32)
            over_grpc = generator.random() < GRPC_SHARE
            bad = draw_bad_push(push, other, captures.stale[number], random.Random(case_seed))
            try:
                outcome = await refuse(bench, push, bad, over_grpc)
            except AssertionError as failure:
                raise AssertionError(f"{failure}; kind {bad.kind!r}, seed {seed}, case {case_seed}") from failure
            tally.num_refused += 1
            tally.num_over_grpc += over_grpc
            tally.kinds[bad.kind] += 1
            tally.errors[type(outcome.error).__name__] += 1


async def bombard_until_nothing_grows(bench: ReceiverBench, captures: Captures, seed: int, num_bad: int) -> Tally:
    """What a push leaves, every bombardment leaves again; gRPC's pollers and a connection made anew
    come once.
    """
    for _ in range(MAX_BOMBARDMENTS):
        descriptors, num_tasks = open_descriptors(), len(asyncio.all_tasks())
        tally = await bombard(bench, captures, seed, num_bad)
        left = open_descriptors() - descriptors
        assert len(asyncio.all_tasks()) <= num_tasks, "tasks are left"
        if not left:
            return tally
    raise AssertionError(f"descriptors are left by each bombardment: {dict(left)}")


async def check_bombardment(bench: ReceiverBench, seed: int, num_bad: int) -> Tally:
    client = await RegionClient.connect(bench.memory.endpoint, SHARED_REGION_BYTES)
    captures = await capture_all(client)
    num_regions = bench.memory.num_regions
    await accept(bench, captures.pushes[0][0], over_grpc=True)  # connects, and starts threads
    await bombard(bench, captures, seed, BAD_PUSHES_PER_ROUND)
    tally = await bombard_until_nothing_grows(bench, captures, seed, num_bad)
    assert tally.num_refused >= num_bad
    assert set(tally.kinds) == KINDS, f"never drawn: {KINDS - set(tally.kinds)}"
    assert set(tally.errors) == {"TransferError", "TicketError", "FingerprintError"}
    assert tally.num_over_grpc > 0
    assert bench.memory.num_regions == num_regions == NUM_SOURCES * len(SHARED_RESERVATIONS)
    assert not bench.memory._lent, "a region is still lent"
    client.close()
    return tally


async def test_mutated_and_replayed_pushes_are_refused_and_change_no_block(receiver: ReceiverBench) -> None:
    await check_bombardment(receiver, seed=1, num_bad=3000)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_mutated_and_replayed_pushes_are_refused(receiver: ReceiverBench) -> None:
    tally = await check_bombardment(receiver, seed=random.SystemRandom().randrange(2**32), num_bad=100_000)
    print(f"\nrefused {tally.num_refused}, accepted {tally.num_accepted}, over gRPC {tally.num_over_grpc}")
    print(f"errors {dict(tally.errors)}, kinds {dict(tally.kinds.most_common())}")


def accept_all(*arguments: object) -> bool:
    return True


GUARDS = {
    "digest": (kv_receiver, "hmac", SimpleNamespace(compare_digest=accept_all)),
    "ticket": (write_grants, "hmac", SimpleNamespace(compare_digest=accept_all)),
    "fingerprint": (kv_receiver.KVReceiver, "_check_header", accept_all),
    "range": (kv_receiver._IncomingPush, "_check_range", accept_all),
    "first tokens": (kv_receiver, "_check_first_tokens", accept_all),
}


@pytest.mark.parametrize("guard", GUARDS)
async def test_a_guard_that_is_not_there_would_be_noticed(
    receiver: ReceiverBench, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    """The test of the test: without one of the receiver's checks, something is accepted, or a block
    changes.
    """
    monkeypatch.setattr(*GUARDS[guard])
    with pytest.raises(AssertionError, match=r"a block changed|accepted|refused as"):
        await check_bombardment(receiver, seed=1, num_bad=3000)
