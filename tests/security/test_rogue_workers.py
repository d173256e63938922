"""A stranger at a worker's port: each case ends in a refusal or within its bound, and the victim's
stream goes on.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from decode_worker import reservation_watch
from decode_worker.vllm_engine.service import DecodeGeneration
from kvrelay.core.job import Job
from kvrelay.core.job_validation import MAX_ATTEMPT
from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import InvalidRequestError, UnavailableError
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.registered_peers import RegisteredPeers
from kvrelay.v1 import decode_pb2, session_pb2
from kvrelay.wire.convert import job_id_to_pb, reserve_to_pb, start_prefill_to_pb
from kvrelay.worker import gateway_sessions
from kvrelay.worker.engine_setup import WorkerEngine
from tests.support import redis_fixtures
from tests.support.held_steps import HeldSteps
from tests.support.jobs import make_job
from tests.support.scripted_gateway import ScriptedSession, session_with
from tests.support.worker_fixtures import running_decode_worker, running_prefill_worker, tiny_engine

server, connection = redis_fixtures.server, redis_fixtures.connection

PROMPT = list(range(5, 45))
VICTIM, STRANGER = "gateway-victim", "gateway-stranger"
FAR_AHEAD = [2, 1000, MAX_ATTEMPT, MAX_ATTEMPT + 1, 2**32 - 1]


@pytest.fixture(scope="module")
def engine() -> WorkerEngine:
    return tiny_engine(num_kv_blocks=256)


class Owners:
    """What Redis says; None: it does not answer."""

    def __init__(self, owner: str | None = None) -> None:
        self.owner = owner
        self.num_questions = 0

    async def owner_of(self, request_id: str) -> str | None:
        self.num_questions += 1
        if self.owner is None:
            raise UnavailableError("Redis does not answer")
        return self.owner


async def send_job(role: str, session: ScriptedSession, job: Job) -> None:
    if role == "decode":
        await session.send(reserve=reserve_to_pb(job, session.hello.model.fingerprint))
    else:
        await session.send(start_prefill=start_prefill_to_pb(job, bytes(16), "127.0.0.1:1", 0))


async def run_locally(session: ScriptedSession, job: Job) -> None:
    await send_job("decode", session, job)
    await session.expect("reserved")
    await session.send(run_prompt=decode_pb2.RunPrompt(job_id=job_id_to_pb(job.job_id)))


async def refusal(session: ScriptedSession, job: Job) -> session_pb2.FailureKind.ValueType:
    failed: session_pb2.JobFailed = await session.expect("job_failed")
    assert failed.job_id == job_id_to_pb(job.job_id)
    assert failed.message
    return failed.kind


@pytest.mark.parametrize(
    ("owner", "refused_with"),
    [
        (VICTIM, session_pb2.FAILURE_KIND_SUPERSEDED),
        (None, session_pb2.FAILURE_KIND_UNPROVEN),
    ],
)
async def test_a_stranger_with_a_victims_request_id_is_refused_and_the_victim_is_served(
    engine: WorkerEngine, owner: str | None, refused_with: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, owners, job = HeldSteps(engine, monkeypatch), Owners(owner), make_job(PROMPT, 6)
    async with (
        running_decode_worker(engine, owners=owners) as worker,
        session_with("decode", worker.address, gateway_id=VICTIM) as victim,
        session_with("decode", worker.address, gateway_id=STRANGER) as stranger,
    ):
        await run_locally(victim, job)
        await steps.wait_until_begun()
        for attempt in FAR_AHEAD:
            claim = make_job(PROMPT, 6, attempt=attempt)
            await send_job("decode", stranger, claim)
            kind = await refusal(stranger, claim)
            assert kind == (session_pb2.FAILURE_KIND_INVALID if attempt > MAX_ATTEMPT else refused_with)
        steps.released.set()
        assert len(await victim.collect_tokens(job.job_id, 0)) == 6
        assert "job_failed" not in victim.seen()
        # Nothing of the stranger's numbers shuts a later attempt out.
        await run_locally(victim, make_job(PROMPT, 6, attempt=2))
        await victim.cancel_job(make_job(PROMPT, 6, attempt=2).job_id)
        await worker.wait_until_idle()


async def test_the_first_attempt_of_a_request_far_ahead_needs_redis_too(engine: WorkerEngine) -> None:
    claim, owners = make_job(PROMPT, 6, attempt=5000), Owners()
    async with (
        running_decode_worker(engine, owners=owners) as worker,
        session_with("decode", worker.address, gateway_id=VICTIM) as victim,
    ):
        await send_job("decode", victim, claim)
        assert await refusal(victim, claim) == session_pb2.FAILURE_KIND_UNPROVEN
        owners.owner = VICTIM
        await run_locally(victim, claim)
        assert len(await victim.collect_tokens(claim.job_id, 0)) == 6


async def test_a_stranger_that_came_first_gives_way_to_the_owner_of_the_request(engine: WorkerEngine) -> None:
    claim, job = make_job(PROMPT, 6, attempt=900), make_job(PROMPT, 6, attempt=2)
    async with (
        running_decode_worker(engine, owners=Owners(VICTIM)) as worker,
        session_with("decode", worker.address, gateway_id=VICTIM) as victim,
        session_with("decode", worker.address, gateway_id=STRANGER) as stranger,
    ):
        await send_job("decode", stranger, claim)
        await stranger.expect("reserved")
        await run_locally(victim, job)
        assert len(await victim.collect_tokens(job.job_id, 0)) == 6
        assert await refusal(stranger, claim) == session_pb2.FAILURE_KIND_SUPERSEDED


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_superseded_session_is_told_at_once(
    engine: WorkerEngine, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its stream would be silent until the deadline."""
    steps, job, next_job = HeldSteps(engine, monkeypatch), make_job(PROMPT, 6), make_job(PROMPT, 6, attempt=2)
    running: Any = running_decode_worker if role == "decode" else running_prefill_worker
    async with (
        running(engine, owners=Owners(STRANGER)) as worker,
        session_with(role, worker.address, gateway_id=VICTIM) as former,
        session_with(role, worker.address, gateway_id=STRANGER) as successor,
    ):
        if role == "decode":
            await run_locally(former, job)
        else:
            await send_job(role, former, job)
        await steps.wait_until_begun()
        await send_job(role, successor, next_job)
        # The engine stands in its step still.
        assert await refusal(former, job) == session_pb2.FAILURE_KIND_SUPERSEDED
        again = make_job(PROMPT, 6, attempt=3)
        await send_job(role, former, again)
        assert await refusal(former, again) == session_pb2.FAILURE_KIND_SUPERSEDED
        await successor.cancel_job(next_job.job_id)
        steps.released.set()
        await worker.wait_until_idle()


async def test_a_job_that_is_cancelled_while_redis_is_asked_does_not_begin(
    engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, job, claim = HeldSteps(engine, monkeypatch), make_job(PROMPT, 6), make_job(PROMPT, 6, attempt=2)
    async with (
        running_decode_worker(engine, owners=Owners(STRANGER)) as worker,
        session_with("decode", worker.address, gateway_id=VICTIM) as victim,
        session_with("decode", worker.address, gateway_id=STRANGER) as stranger,
    ):
        await run_locally(victim, job)
        await steps.wait_until_begun()
        service = worker.services.sessions
        # Both in one turn of the loop, before the answer can come.
        sink = next(session for session in service._sessions if session.gateway_id == STRANGER)
        service.admit(sink, reserve_to_pb(claim, engine.model.fingerprint), lambda job: pytest.fail("begun"))
        service.cancel(sink, claim.job_id)
        await stranger.send(heartbeat=session_pb2.Heartbeat(number=1))
        await stranger.expect("heartbeat_ack")
        steps.released.set()
        assert len(await victim.collect_tokens(job.job_id, 0)) == 6


@pytest.mark.parametrize("gateway_id", ["", "g" * 129, "gw\n2026-01-01 FORGED LINE", "\x1b[2Jx", "g" * 4_000_000])
async def test_a_gateway_id_that_no_gateway_has_is_refused(engine: WorkerEngine, gateway_id: str) -> None:
    async with running_decode_worker(engine) as worker:
        with pytest.raises((AssertionError, grpc.aio.AioRpcError), match="INVALID_ARGUMENT"):
            async with session_with("decode", worker.address, gateway_id=gateway_id):
                pass


async def test_sessions_and_their_jobs_are_bounded(engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_sessions, "MAX_SESSIONS", 1)
    monkeypatch.setattr(gateway_sessions, "MAX_JOBS_PER_SESSION", 1)
    first, second = make_job(PROMPT, 6), make_job(PROMPT, 6, request_id="b" * 32)
    async with running_decode_worker(engine) as worker:
        async with session_with("decode", worker.address) as session:
            await send_job("decode", session, first)
            await session.expect("reserved")
            await send_job("decode", session, second)
            assert await refusal(session, second) == session_pb2.FAILURE_KIND_OUT_OF_CAPACITY
            with pytest.raises((AssertionError, grpc.aio.AioRpcError), match="RESOURCE_EXHAUSTED"):
                async with session_with("decode", worker.address):
                    pass
        await worker.wait_until_idle()


async def test_an_isolated_reservation_without_a_prompt_stops_others_for_a_moment_only(
    engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation_watch, "ISOLATED_LIMIT_S", 0.05)
    job = make_job(PROMPT, 200)
    frozen = [replace(make_job(PROMPT, 6, request_id=each * 32), isolated=True) for each in "fe"]
    async with (
        running_decode_worker(engine) as worker,
        session_with("decode", worker.address, gateway_id=VICTIM) as victim,
        session_with("decode", worker.address, gateway_id=STRANGER) as stranger,
    ):
        await run_locally(victim, job)
        await victim.expect("decode_started")
        await send_job("decode", stranger, frozen[0])
        await stranger.expect("reserved")
        assert await refusal(stranger, frozen[0]) == session_pb2.FAILURE_KIND_OUT_OF_CAPACITY
        # The next one is refused at once, so that no stranger stops others again and again.
        await send_job("decode", stranger, frozen[1])
        assert await refusal(stranger, frozen[1]) == session_pb2.FAILURE_KIND_OUT_OF_CAPACITY
        assert "reserved" not in stranger.seen()
        assert len(await victim.collect_tokens(job.job_id, 0)) == 200


async def test_an_isolated_job_that_runs_cannot_be_paused(engine: WorkerEngine) -> None:
    alone, job = replace(make_job(PROMPT, 6, request_id="f" * 32), isolated=True), make_job(PROMPT, 6)
    async with (
        running_decode_worker(engine) as worker,
        session_with("decode", worker.address, gateway_id=VICTIM) as victim,
        session_with("decode", worker.address, gateway_id=STRANGER) as stranger,
    ):
        await send_job("decode", stranger, alone)
        await stranger.expect("reserved")
        pause = decode_pb2.SetPaused(job_id=job_id_to_pb(alone.job_id), paused=True)
        await stranger.send(set_paused=pause)
        await stranger.send(run_prompt=decode_pb2.RunPrompt(job_id=job_id_to_pb(alone.job_id)))
        await run_locally(victim, job)
        assert len(await victim.collect_tokens(job.job_id, 0)) == 6
        await stranger.cancel_job(alone.job_id)
        await worker.wait_until_idle()


async def test_reservations_with_nothing_behind_them_give_way_to_others(
    engine: WorkerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation_watch, "IDLE_LIMIT_S", 0.05)
    monkeypatch.setattr(reservation_watch, "LOOK_INTERVAL_S", 0.05)
    held = [make_job([5 + n] * 440, 6, request_id=f"{n:032x}") for n in range(3)]
    job = make_job(PROMPT * 2, 6)
    async with (
        running_decode_worker(engine) as worker,
        session_with("decode", worker.address, gateway_id=VICTIM) as victim,
        session_with("decode", worker.address, gateway_id=STRANGER) as stranger,
    ):
        for each in held:  # two fit, and the third waits ahead of the victim
            await send_job("decode", stranger, each)
        await stranger.expect("reserved")
        await stranger.expect("reserved")
        await run_locally(victim, job)
        assert len(await victim.collect_tokens(job.job_id, 0)) == 6
        kinds = {(await stranger.expect("job_failed")).kind for _ in range(2)}
        assert kinds == {session_pb2.FAILURE_KIND_OUT_OF_CAPACITY}
        for each in held:
            await stranger.cancel_job(each.job_id)
        await worker.wait_until_idle()


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_session_that_fills_the_queue_leaves_others_their_part_of_it(
    engine: WorkerEngine, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_places, num_wanted = 8, 3
    steps = HeldSteps(engine, monkeypatch)
    running: Any = running_decode_worker if role == "decode" else running_prefill_worker
    async with (
        running(engine, max_waiting_works=num_places) as worker,
        session_with(role, worker.address, gateway_id=VICTIM) as victim,
        session_with(role, worker.address, gateway_id=STRANGER) as stranger,
    ):
        await run_first(role, stranger)
        await steps.wait_until_begun()
        # Two at most get blocks, and the others wait.
        floods = [make_job([5 + n % 40] * 440, 6, request_id=f"{n:032x}") for n in range(40)]
        wanted = [make_job([5 + n] * 440, 6, request_id=f"{n:032x}") for n in range(100, 100 + num_wanted)]
        await send_all(role, stranger, floods)
        await send_all(role, victim, wanted)
        steps.released.set()
        for _ in range(len(floods) - num_places - 2 + num_wanted):
            while (await stranger.expect("job_failed")).kind != session_pb2.FAILURE_KIND_OUT_OF_CAPACITY:
                pass
        victim.seen()
        kinds = {response.job_failed.kind for name, response in victim._kept if name == "job_failed"}
        assert session_pb2.FAILURE_KIND_OUT_OF_CAPACITY not in kinds
        for session, jobs in ((stranger, floods), (victim, wanted)):
            for each in jobs:
                await session.cancel_job(each.job_id)
        await worker.wait_until_idle()


async def send_all(role: str, session: ScriptedSession, jobs: list[Job]) -> None:
    """Returns once the worker has read them."""
    for each in jobs:
        await send_job(role, session, each)
    await session.send(heartbeat=session_pb2.Heartbeat(number=1))
    await session.expect("heartbeat_ack")


async def run_first(role: str, session: ScriptedSession) -> None:
    """A job that the engine stands in."""
    job = make_job(PROMPT, 6, request_id="e" * 32)
    if role == "decode":
        await run_locally(session, job)
    else:
        await send_job(role, session, job)


@pytest.fixture
async def peers(connection: RedisConnection) -> tuple[RegisteredPeers, MemberRegistry]:
    registry = MemberRegistry(connection)
    return RegisteredPeers(registry), registry


async def test_a_prefill_worker_dials_registered_decode_workers_only(
    engine: WorkerEngine, peers: tuple[RegisteredPeers, MemberRegistry]
) -> None:
    """Hundreds of addresses leave nothing behind, because no connection is tried."""
    num_dialled = 0

    def on_dialled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_dialled
        num_dialled += 1
        writer.close()

    listener = await asyncio.start_server(on_dialled, "127.0.0.1", 0)
    address = "{}:{}".format(*listener.sockets[0].getsockname())
    view, registry = peers
    jobs = [make_job([5 + n % 9] * 30, 6, request_id=f"{n:032x}") for n in range(60)]
    async with (
        listener,
        running_prefill_worker(engine, peers=view) as worker,
        session_with("prefill", worker.address, gateway_id=STRANGER) as stranger,
    ):
        for each in jobs:
            await stranger.send(start_prefill=start_prefill_to_pb(each, bytes(16), address, 0))
        failed = [await stranger.expect("job_failed") for _ in jobs]
        assert {each.kind for each in failed} <= {
            session_pb2.FAILURE_KIND_TRANSFER,
            session_pb2.FAILURE_KIND_OUT_OF_CAPACITY,
        }
        assert "no decode worker is registered" in failed[0].message
        assert num_dialled == 0
        # The same address is dialled once a decode worker has registered it.
        async with registry.lease(Member("decode-1", MemberRole.DECODE, address)):
            job = make_job(PROMPT, 6)
            await stranger.send(start_prefill=start_prefill_to_pb(job, bytes(16), address, 0))
            assert "no decode worker is registered" not in (await stranger.expect("job_failed")).message
        assert num_dialled > 0
        await worker.wait_until_idle()


async def test_an_address_of_a_client_is_not_dialled(peers: tuple[RegisteredPeers, MemberRegistry]) -> None:
    view, registry = peers
    generation = DecodeGeneration.__new__(DecodeGeneration)
    generation._peers = view
    await generation._check_address(None)
    with pytest.raises(InvalidRequestError, match="no prefill worker is registered"):
        await generation._check_address("127.0.0.1:9")
    async with registry.lease(Member("decode-1", MemberRole.DECODE, "127.0.0.1:9")):
        with pytest.raises(InvalidRequestError):  # of another role
            await generation._check_address("127.0.0.1:9")
    async with registry.lease(Member("prefill-1", MemberRole.PREFILL, "127.0.0.1:8")):
        await generation._check_address("127.0.0.1:8")
