"""Sessions of real workers with a scripted gateway: greeting, liveness, leases, attempts, cancels,
deadlines, drain.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from decode_worker import kv_receiver
from kvrelay.core.job import Job
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.kv_transfer.codec import Chunk, chunk_digest, encode_chunk
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.transports import GrpcTransport, PushPlan
from kvrelay.network.rpc import create_channel
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, session_pb2
from kvrelay.wire.convert import job_id_to_pb, reserve_to_pb, start_prefill_to_pb
from kvrelay.worker.engine_setup import WorkerEngine
from kvrelay.worker.engine_thread import EngineThread
from tests.support.jobs import make_job
from tests.support.scripted_gateway import ScriptedSession, session_with
from tests.support.worker_fixtures import RunningWorker, running_decode_worker, running_prefill_worker, tiny_engine

PROMPT = list(range(5, 45))
LONG = 400
SLOW_STEP_S = 0.05
"""Of every step of `slow_steps`: `LONG` tokens are twenty seconds, whatever the machine."""


@pytest.fixture(scope="module")
def engine() -> WorkerEngine:
    return tiny_engine(num_kv_blocks=256)


@pytest.fixture(scope="module")
def other_engine() -> WorkerEngine:
    return tiny_engine(num_kv_blocks=256)


@pytest.fixture
def slow_steps(engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `LONG` tokens more than a test will wait for."""
    run = engine.step_runner.__class__.run

    def run_slowly(self: Any, *arguments: Any) -> Any:
        time.sleep(SLOW_STEP_S)
        return run(self, *arguments)

    monkeypatch.setattr(engine.step_runner.__class__, "run", run_slowly)


class HeldSteps:
    """The engine is in the middle of a step for as long as a test wants."""

    def __init__(self, engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.released = threading.Event()
        run = engine.step_runner.__class__.run

        def held(runner: Any, *arguments: Any) -> Any:
            self.begun.set()
            assert self.released.wait(60), "released by the test"
            return run(runner, *arguments)

        monkeypatch.setattr(engine.step_runner.__class__, "run", held)

    async def wait_until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 60)


@asynccontextmanager
async def decode_with(engine: WorkerEngine, **options: Any) -> AsyncIterator[tuple[RunningWorker, ScriptedSession]]:
    async with running_decode_worker(engine) as worker, session_with("decode", worker.address, **options) as session:
        yield worker, session


async def reserve(session: ScriptedSession, job: Job) -> decode_pb2.Reserved:
    await session.send(reserve=reserve_to_pb(job, session.hello.model.fingerprint))
    reserved: decode_pb2.Reserved = await session.expect("reserved")
    return reserved


async def run_locally(session: ScriptedSession, job: Job) -> None:
    await reserve(session, job)
    await session.send(run_prompt=decode_pb2.RunPrompt(job_id=job_id_to_pb(job.job_id)))


async def expect_failure(session: ScriptedSession, job: Job) -> session_pb2.FailureKind.ValueType:
    failed: session_pb2.JobFailed = await session.expect("job_failed")
    assert failed.job_id == job_id_to_pb(job.job_id)
    assert failed.message
    return failed.kind


async def test_a_worker_greets_with_its_model_and_tells_its_load_at_rest(engine: WorkerEngine) -> None:
    async with decode_with(engine) as (_, session):
        assert session.hello.model.fingerprint == engine.model.fingerprint
        assert session.hello.block_size == 4
        assert session.hello.max_sequence_tokens == 512
        await session.expect_load(num_blocks=256, num_used_blocks=0)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (
            {"hello": session_pb2.GatewayHello(protocol_version=PROTOCOL_VERSION + 1, gateway_id="g")},
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        ({"heartbeat": session_pb2.Heartbeat(number=1)}, grpc.StatusCode.INVALID_ARGUMENT),
        (
            {"hello": session_pb2.GatewayHello(protocol_version=PROTOCOL_VERSION, gateway_id="g" * 129)},
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
    ids=["version", "no hello", "long id"],
)
async def test_a_session_that_begins_otherwise_is_refused(
    engine: WorkerEngine, message: dict[str, Any], code: grpc.StatusCode
) -> None:
    async with running_decode_worker(engine) as worker:
        channel = create_channel(worker.address)
        call: Any = decode_pb2_grpc.DecodeServiceStub(channel).Session()
        await call.write(decode_pb2.DecodeServiceSessionRequest(**message))
        assert await asyncio.wait_for(call.code(), 30) is code
        await channel.close()


async def test_heartbeats_go_both_ways_and_a_silent_gateway_loses_its_session_and_its_jobs(
    engine: WorkerEngine,
) -> None:
    async with decode_with(engine, window_ms=600) as (worker, session):
        await session.send(heartbeat=session_pb2.Heartbeat(number=3))
        assert (await session.expect("heartbeat_ack")).number == 3
        await reserve(session, make_job(PROMPT, 5))
        session.answers_heartbeats = False
        assert await session.status() is grpc.StatusCode.UNAVAILABLE
        assert session.num_heartbeats > 0
        await worker.wait_until_idle()


@pytest.mark.usefixtures("slow_steps")
async def test_a_session_that_ends_frees_everything_of_it_and_nothing_else(engine: WorkerEngine) -> None:
    mine, other = make_job(PROMPT, LONG), make_job(PROMPT, 6, request_id="b" * 32, cache_salt="b")
    async with decode_with(engine) as (worker, session):
        async with session_with("decode", worker.address) as leaving:
            await run_locally(leaving, mine)
            await leaving.expect("step_output")
            await reserve(leaving, make_job(PROMPT, 5, request_id="c" * 32))
            await run_locally(session, other)
        assert len(await session.collect_tokens(other.job_id, 0)) == 6
        await worker.wait_until_idle()


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("moment", ["reserved", "running", "prefilling"])
async def test_cancelled_job_is_freed_without_a_word(engine: WorkerEngine, moment: str) -> None:
    job = make_job(PROMPT, LONG)
    async with decode_with(engine) as (worker, session):
        await (reserve if moment == "reserved" else run_locally)(session, job)
        if moment == "running":
            await session.expect("step_output")
        await session.cancel_job(job.job_id)
        await worker.wait_until_idle()
        await session.expect_load(num_used_blocks=0, num_running=0, num_waiting=0)
        assert "job_failed" not in session.seen()


async def test_another_gateway_cannot_cancel_or_command_a_job(engine: WorkerEngine) -> None:
    job = make_job(PROMPT, 6)
    async with decode_with(engine) as (worker, session), session_with("decode", worker.address) as stranger:
        await reserve(session, job)
        await stranger.cancel_job(job.job_id)
        await stranger.send(run_prompt=decode_pb2.RunPrompt(job_id=job_id_to_pb(job.job_id)))
        await stranger.send(set_paused=decode_pb2.SetPaused(job_id=job_id_to_pb(job.job_id), paused=True))
        await stranger.send(heartbeat=session_pb2.Heartbeat(number=1))
        await stranger.expect("heartbeat_ack")  # its commands are done
        await session.send(run_prompt=decode_pb2.RunPrompt(job_id=job_id_to_pb(job.job_id)))
        assert len(await session.collect_tokens(job.job_id, 0)) == 6
        assert stranger.seen() == []


@pytest.mark.usefixtures("slow_steps")
async def test_a_newer_attempt_ends_older_ones_and_older_ones_that_come_late_are_refused(engine: WorkerEngine) -> None:
    first, second = make_job(PROMPT, LONG), make_job(PROMPT, 6, attempt=2)
    async with decode_with(engine) as (worker, session):
        await run_locally(session, first)
        await session.expect("step_output")
        await run_locally(session, second)
        tokens = await collect_of_attempt(session, second)
        assert len(tokens) == 6
        await session.send(reserve=reserve_to_pb(first, session.hello.model.fingerprint))
        assert await expect_failure(session, first) == session_pb2.FAILURE_KIND_SUPERSEDED
        await worker.wait_until_idle()


async def collect_of_attempt(session: ScriptedSession, job: Job) -> list[int]:
    token_ids: list[int] = []
    while True:
        for token in (await session.expect("step_output")).tokens:
            if token.job_id.attempt == job.job_id.attempt:
                token_ids.append(token.token.token_id)
                if token.finish_reason:
                    return token_ids


@pytest.mark.usefixtures("slow_steps")
async def test_a_job_fails_by_its_deadline_and_is_freed_at_once(engine: WorkerEngine) -> None:
    running = make_job(PROMPT, LONG, deadline_ms=1500)
    reserved = make_job(PROMPT, 5, request_id="b" * 32, deadline_ms=1500)
    async with decode_with(engine) as (worker, session):
        await run_locally(session, running)
        await reserve(session, reserved)
        begin = asyncio.get_running_loop().time()
        kinds = [(await session.expect("job_failed")).kind for _ in range(2)]
        assert kinds == [session_pb2.FAILURE_KIND_DEADLINE] * 2
        await worker.wait_until_idle()
        assert asyncio.get_running_loop().time() - begin < LONG * SLOW_STEP_S


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"token_ids": ()}, session_pb2.FAILURE_KIND_INVALID),
        ({"token_ids": (5, 320), "num_prompt_tokens": 2}, session_pb2.FAILURE_KIND_INVALID),
        ({"num_prompt_tokens": 41}, session_pb2.FAILURE_KIND_INVALID),
        ({"num_sequences": 9}, session_pb2.FAILURE_KIND_INVALID),
        ({"sampling": SamplingParams(temperature=0.0)}, session_pb2.FAILURE_KIND_INVALID),
        ({"sampling": SamplingParams(temperature=1.0, max_tokens=5)}, session_pb2.FAILURE_KIND_INVALID),
        ({"sampling": SamplingParams(temperature=-1.0, max_tokens=5, seed=1)}, session_pb2.FAILURE_KIND_INVALID),
        ({"sampling": SamplingParams(0.0, max_tokens=5, logit_bias={320: 1.0})}, session_pb2.FAILURE_KIND_INVALID),
        ({"deadline_ms": 0}, session_pb2.FAILURE_KIND_DEADLINE),
    ],
    ids=str,
)
async def test_what_cannot_be_served_is_refused(engine: WorkerEngine, changes: dict[str, Any], kind: int) -> None:
    job = replace(make_job(PROMPT, 5), **changes)
    async with decode_with(engine) as (worker, session):
        await session.send(reserve=reserve_to_pb(job, session.hello.model.fingerprint))
        assert await expect_failure(session, job) == kind
        await worker.wait_until_idle()


@pytest.mark.parametrize(
    "message",
    [
        {"cancel_job": session_pb2.CancelJob(job_id=session_pb2.JobId(request_id="r" * 2**20))},
        {"reserve": decode_pb2.Reserve(cache_salt="s" * 2**20)},
        {"reserve": decode_pb2.Reserve(fingerprint="f" * 2**20)},
    ],
    ids=["id", "salt", "fingerprint"],
)
async def test_a_text_that_no_gateway_sends_ends_the_session(engine: WorkerEngine, message: dict[str, Any]) -> None:
    async with running_decode_worker(engine) as worker, create_channel(worker.address) as channel:
        call: Any = decode_pb2_grpc.DecodeServiceStub(channel).Session()
        hello = session_pb2.GatewayHello(gateway_id="g", protocol_version=PROTOCOL_VERSION, liveness_window_ms=30_000)
        await call.write(decode_pb2.DecodeServiceSessionRequest(hello=hello))
        await call.write(decode_pb2.DecodeServiceSessionRequest(**message))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await asyncio.wait_for(read_all(call), 30)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "bytes; at most" in str(failure.value.details())


async def read_all(call: Any) -> None:
    async for _ in call:
        pass


async def test_another_fingerprint_is_refused_before_anything_is_reserved(engine: WorkerEngine) -> None:
    job = make_job(PROMPT, 5)
    async with decode_with(engine) as (worker, session):
        await session.send(reserve=reserve_to_pb(job, "another"))
        assert await expect_failure(session, job) == session_pb2.FAILURE_KIND_INVALID
        assert worker.engine.blocks.num_used_blocks == 0


@pytest.mark.usefixtures("slow_steps")
async def test_a_stopped_sequence_ends_without_further_tokens(engine: WorkerEngine) -> None:
    job = make_job(PROMPT, LONG)
    async with decode_with(engine) as (worker, session):
        await run_locally(session, job)
        await session.expect("step_output")
        await session.send(finish_sequence=decode_pb2.FinishSequence(job_id=job_id_to_pb(job.job_id), sequence=0))
        await worker.wait_until_idle()


async def test_the_tickets_of_a_cancelled_reservation_and_of_a_broken_push_are_void(engine: WorkerEngine) -> None:
    job = make_job(PROMPT, 5)
    transport = GrpcTransport(20_000)
    async with decode_with(engine) as (worker, session):
        reserved = await reserve(session, job)
        plan = PushPlan(job.job_id, reserved.ticket, engine.model.fingerprint, reserved.num_cached_tokens, len(PROMPT))
        push = await transport.open(reserved.push_address, plan)
        span = KVSpan(0, 1, reserved.num_cached_tokens, len(PROMPT))
        payload = bytes(span.num_bytes(engine.model.kv_layout))
        await push.send_chunk(encode_chunk(Chunk(span, payload, chunk_digest(reserved.ticket, 1, span, payload))))
        assert await anext(push.replies())
        push.close(is_complete=False)
        assert await expect_failure(session, job) == session_pb2.FAILURE_KIND_TRANSFER
        await worker.wait_until_idle()
        late = await transport.open(reserved.push_address, plan)
        with pytest.raises(Exception, match="ticket"):
            await anext(late.replies())
    await transport.close()


async def test_a_draining_worker_refuses_new_jobs_lets_running_job_end_and_says_so(
    engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = HeldSteps(engine, monkeypatch)
    running, late = (make_job(PROMPT, n, request_id=c * 32) for n, c in ((60, "a"), (5, "b")))
    async with decode_with(engine) as (worker, session):
        await run_locally(session, running)
        await steps.wait_until_begun()
        draining = asyncio.create_task(worker.services.sessions.drain(120_000))
        await session.expect_load(draining=True)
        await session.send(reserve=reserve_to_pb(late, session.hello.model.fingerprint))
        assert await expect_failure(session, late) == session_pb2.FAILURE_KIND_DRAINING
        steps.released.set()
        assert len(await session.collect_tokens(running.job_id, 0)) == 60
        await draining
        await worker.wait_until_idle()


@pytest.mark.usefixtures("slow_steps")
async def test_what_does_not_end_within_the_drain_timeout_fails_with_draining(engine: WorkerEngine) -> None:
    endless, reserved = make_job(PROMPT, LONG), make_job(PROMPT, 5, request_id="b" * 32)
    async with decode_with(engine) as (worker, session):
        await run_locally(session, endless)
        await reserve(session, reserved)
        await worker.services.sessions.drain(1)
        kinds = [(await session.expect("job_failed")).kind for _ in range(2)]
        assert kinds == [session_pb2.FAILURE_KIND_DRAINING] * 2
        # ended by the worker, so that its exit waits for nobody
        assert await session.status() is grpc.StatusCode.OK
        await worker.wait_until_idle()


async def test_a_failing_step_fails_its_jobs_and_the_worker_goes_on(
    engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [make_job(PROMPT, 5, request_id=c * 32) for c in "ab"]
    num_calls = 0
    run = engine.step_runner.__class__.run

    def fail_once(self: Any, *arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("injected")
        return run(self, *arguments)

    monkeypatch.setattr(engine.step_runner.__class__, "run", fail_once)
    async with decode_with(engine) as (worker, session):
        await run_locally(session, jobs[0])
        assert await expect_failure(session, jobs[0]) == session_pb2.FAILURE_KIND_INTERNAL
        await run_locally(session, jobs[1])
        assert len(await session.collect_tokens(jobs[1].job_id, 0)) == 5
        await worker.wait_until_idle()
    assert num_calls > 1


async def test_job_for_a_full_inbox_is_refused_and_nothing_of_it_is_left(
    engine: WorkerEngine, other_engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(PROMPT, 5)
    is_full = True
    submit_job = EngineThread.submit_job
    monkeypatch.setattr(EngineThread, "submit_job", lambda self, command: not is_full and submit_job(self, command))
    async with (
        decode_with(engine) as (worker, session),
        running_prefill_worker(other_engine) as prefill,
        session_with("prefill", prefill.address) as prefill_session,
    ):
        await session.send(reserve=reserve_to_pb(job, session.hello.model.fingerprint))
        assert await expect_failure(session, job) == session_pb2.FAILURE_KIND_OUT_OF_CAPACITY
        await prefill_session.send(start_prefill=start_prefill_to_pb(job, bytes(16), worker.address, 0))
        assert await expect_failure(prefill_session, job) == session_pb2.FAILURE_KIND_OUT_OF_CAPACITY
        await worker.wait_until_idle()
        await prefill.wait_until_idle()
        is_full = False
        again = replace(job, job_id=replace(job.job_id, attempt=2))
        await run_locally(session, again)
        assert len(await session.collect_tokens(again.job_id, 0)) == 5
        await worker.wait_until_idle()


async def test_prefill_with_a_receiver_that_is_not_there_fails_with_transfer(engine: WorkerEngine) -> None:
    job = make_job(PROMPT, 5)
    async with running_prefill_worker(engine) as worker, session_with("prefill", worker.address) as session:
        await session.send(start_prefill=start_prefill_to_pb(job, bytes(16), "127.0.0.1:1", 0))
        assert await expect_failure(session, job) == session_pb2.FAILURE_KIND_TRANSFER
        await worker.wait_until_idle()


@pytest.mark.parametrize(
    ("ticket", "num_cached_tokens"),
    [(b"", 0), (bytes(15), 0), (bytes(2**20), 0), (bytes(16), len(PROMPT))],
    ids=["none", "short", "long", "cached"],
)
async def test_a_push_that_could_never_be_is_refused_before_the_prompt_is_computed(
    engine: WorkerEngine, ticket: bytes, num_cached_tokens: int
) -> None:
    job = make_job(PROMPT, 5)
    async with running_prefill_worker(engine) as worker, session_with("prefill", worker.address) as session:
        await session.send(start_prefill=start_prefill_to_pb(job, ticket, "127.0.0.1:1", num_cached_tokens))
        assert await expect_failure(session, job) == session_pb2.FAILURE_KIND_INVALID
        assert worker.services.sessions.num_jobs == 0


@pytest.mark.parametrize("address", ["", "no address", "127.0.0.1:1"])
async def test_prefill_that_is_cancelled_before_its_push_connects_is_freed(engine: WorkerEngine, address: str) -> None:
    job = make_job(PROMPT, 5)
    async with running_prefill_worker(engine) as worker, session_with("prefill", worker.address) as session:
        await session.send(start_prefill=start_prefill_to_pb(job, bytes(16), address, 0))
        await session.cancel_job(job.job_id)
        await end_of_all_before(session)
        await worker.wait_until_idle()


NO_HEARTBEATS_MS = 60_000
"""A window in which no heartbeat brings the load before a test gives up."""


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("num_sequences", [1, 2])
async def test_every_gateway_hears_at_once_of_blocks_that_are_free_again(
    engine: WorkerEngine, num_sequences: int
) -> None:
    job = make_job(PROMPT, LONG, num_sequences=num_sequences)
    async with (
        decode_with(engine, window_ms=NO_HEARTBEATS_MS) as (worker, session),
        session_with("decode", worker.address, NO_HEARTBEATS_MS) as other,
    ):
        await run_locally(session, job)
        await session.expect("step_output")
        await session.cancel_job(job.job_id)
        await asyncio.gather(*(each.expect_load(num_running=0, num_used_blocks=0) for each in (session, other)))


async def test_a_gateway_hears_at_once_of_prompts_that_it_gave_up_at_any_moment(engine: WorkerEngine) -> None:
    async with (
        running_prefill_worker(engine) as worker,
        session_with("prefill", worker.address, NO_HEARTBEATS_MS) as session,
    ):
        for number in range(20):
            job = make_job(PROMPT, 5, request_id=f"{number:032x}", cache_salt=str(number))
            await session.send(start_prefill=start_prefill_to_pb(job, bytes(16), "127.0.0.1:1", 0))
            for _ in range(number):
                await asyncio.sleep(0)  # anywhere between its arrival and the failure of its push
            await session.cancel_job(job.job_id)
            await worker.wait_until_idle()
        await session.expect_load(num_running=0, num_waiting=0, num_used_blocks=0)
        await end_of_all_before(session)  # the last may be on its way still
        await worker.wait_until_idle()


async def end_of_all_before(session: ScriptedSession) -> None:
    """A prefill worker has handled all that it was sent before: a job that needs no push is done,
    and those were there first.
    """
    last = make_job(PROMPT, 1, request_id="f" * 32)
    await session.send(start_prefill=start_prefill_to_pb(last, bytes(16), "127.0.0.1:1", 0))
    assert (await session.expect("transfer_done")).job_id == job_id_to_pb(last.job_id)


class HeldExports:
    """Keeps KV from leaving the pool, so that a push is in the middle for as long as a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.released = threading.Event()
        export_kv = PagedKVCache.export_kv

        def held(cache: PagedKVCache, *arguments: Any) -> Any:
            self.begun.set()
            assert self.released.wait(60), "released by the test"
            return export_kv(cache, *arguments)

        self._received = asyncio.Event()

        def receives(name: str, *subjects: object) -> None:
            if name == "decode.push_begun":
                self._received.set()

        monkeypatch.setattr(PagedKVCache, "export_kv", held)
        monkeypatch.setattr(kv_receiver, "fault_point", receives)

    async def wait_until_begun(self) -> None:
        """The pool is read, and the decode worker has the push's header."""
        assert await asyncio.to_thread(self.begun.wait, 60)
        await asyncio.wait_for(self._received.wait(), 60)


async def test_a_prefill_session_that_ends_breaks_its_pushes_and_the_decode_worker_frees_its_reservation(
    engine: WorkerEngine, other_engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = HeldExports(monkeypatch)
    job = make_job(PROMPT * 8, 5, cache_salt="end")
    async with decode_with(engine) as (decode_worker, decode), running_prefill_worker(other_engine) as prefill_worker:
        reserved = await reserve(decode, job)
        async with session_with("prefill", prefill_worker.address) as prefill:
            await prefill.send(start_prefill=start_prefill_to_pb(job, reserved.ticket, reserved.push_address, 0))
            await exports.wait_until_begun()
        exports.released.set()
        await prefill_worker.wait_until_idle()
        assert await expect_failure(decode, job) == session_pb2.FAILURE_KIND_TRANSFER
        await decode_worker.wait_until_idle()
        assert prefill_worker.services.sessions.load.num_used_blocks == 0


async def test_a_decode_cancel_in_the_middle_of_a_push_fails_the_prefill_with_transfer(
    engine: WorkerEngine, other_engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = HeldExports(monkeypatch)
    job = make_job(PROMPT * 8, 5, cache_salt="cancel")
    async with (
        decode_with(engine) as (decode_worker, decode),
        running_prefill_worker(other_engine) as prefill_worker,
        session_with("prefill", prefill_worker.address) as prefill,
    ):
        reserved = await reserve(decode, job)
        await prefill.send(start_prefill=start_prefill_to_pb(job, reserved.ticket, reserved.push_address, 0))
        await exports.wait_until_begun()
        await decode.cancel_job(job.job_id)
        await decode_worker.wait_until_idle()
        exports.released.set()
        assert await expect_failure(prefill, job) == session_pb2.FAILURE_KIND_TRANSFER
        await asyncio.gather(prefill_worker.wait_until_idle(), decode_worker.wait_until_idle())
