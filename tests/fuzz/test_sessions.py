"""Sessions of workers, given garbage: it is refused with typed errors, and the jobs of others get
their tokens.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from kvrelay.config.settings import TransferSettings
from kvrelay.errors import DeadlineError, InternalError, InvalidRequestError, PreconditionError
from kvrelay.network.rpc import create_sync_channel
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.session_calls import (
    DECODE,
    PREFILL,
    Protocol,
    SessionOutcome,
    decode_commands,
    good_job,
    odd_commands,
    prefill_commands,
    run_session,
)
from tests.support.worker_fixtures import RunningWorker, running_decode_worker, running_prefill_worker, tiny_engine

NUM_GOOD_TOKENS = 12
JOBS_PER_SESSION = 10


@asynccontextmanager
async def running(protocol: Protocol) -> AsyncIterator[RunningWorker]:
    if protocol is DECODE:
        async with running_decode_worker(tiny_engine()) as worker:
            yield worker
    else:
        transfer = TransferSettings(transfer_message_kib=16, transfer_connect_timeout_ms=200)
        async with running_prefill_worker(tiny_engine(), transfer) as worker:
            yield worker


class Fuzzer:
    """Sessions with one worker."""

    def __init__(self, protocol: Protocol, worker: RunningWorker, channel: grpc.Channel, seed: int) -> None:
        self.protocol = protocol
        self.worker = worker
        self.channel = channel
        self.generator = random.Random(seed)
        self.errors: Counter[str] = Counter()
        self.num_failed_jobs = 0
        self.good_tokens: list[int] = []

    async def run(self, odd: list[bytes], hello: bytes | None = None) -> SessionOutcome:
        """One session; its good job's tokens are checked, unless the session was ended for bytes
        that are no message.
        """
        job = good_job(self.generator, NUM_GOOD_TOKENS if self.protocol is DECODE else 1)
        fingerprint = self.worker.engine.model.fingerprint
        commands = decode_commands(job, fingerprint)[:2] if self.protocol is DECODE else prefill_commands(job)[:1]
        good = [command.SerializeToString() for command in commands]
        outcome = await asyncio.to_thread(
            run_session, self.channel, self.protocol, hello or self.protocol.hello(), good, odd
        )
        assert not isinstance(outcome.error, InternalError | DeadlineError), outcome.error
        self.errors[type(outcome.error).__name__] += 1
        self.num_failed_jobs += outcome.num_failed_jobs
        if outcome.error is None:
            assert outcome.good_tokens == self.good_tokens
        else:
            assert isinstance(outcome.error, InvalidRequestError | PreconditionError), outcome.error
            assert len(outcome.error.message) > 10
        return outcome

    async def bombard(self, num_sessions: int) -> None:
        """Sessions full of garbage, and between them hellos that are none."""
        self.good_tokens = (await self._first()).good_tokens
        assert len(self.good_tokens) == (NUM_GOOD_TOKENS if self.protocol is DECODE else 1)
        fingerprint = self.worker.engine.model.fingerprint
        for number in range(num_sessions):
            raw_share = 0.1 if number % 3 == 0 else 0.0
            await self.run(odd_commands(self.protocol, fingerprint, self.generator, JOBS_PER_SESSION, raw_share))
            await self.run([], mutate_bytes(self.protocol.hello(), self.generator.randbytes(20), self.generator))
            await self.run([])
        await self.worker.wait_until_idle()
        assert self.num_failed_jobs > num_sessions
        assert {"NoneType", "InvalidRequestError"} <= set(self.errors)

    async def _first(self) -> SessionOutcome:
        job = good_job(self.generator, NUM_GOOD_TOKENS if self.protocol is DECODE else 1)
        fingerprint = self.worker.engine.model.fingerprint
        commands = decode_commands(job, fingerprint)[:2] if self.protocol is DECODE else prefill_commands(job)[:1]
        good = [command.SerializeToString() for command in commands]
        return await asyncio.to_thread(run_session, self.channel, self.protocol, self.protocol.hello(), good, [])


PROTOCOLS = {"decode": DECODE, "prefill": PREFILL}


@pytest.mark.parametrize("role", PROTOCOLS)
@pytest.mark.parametrize("num_sessions", [15, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
async def test_garbage_on_a_session_fails_its_own_jobs_only(role: str, num_sessions: int) -> None:
    protocol = PROTOCOLS[role]
    async with running(protocol) as worker:
        with create_sync_channel(worker.address) as channel:
            await Fuzzer(protocol, worker, channel, num_sessions).bombard(num_sessions)
