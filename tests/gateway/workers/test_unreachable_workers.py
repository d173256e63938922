"""Unreachable workers are logged with address, reason and advice."""

import asyncio
import socket
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.workers import sessions as worker_sessions
from gateway.workers.session import SessionSettings
from gateway.workers.sessions import WorkerSessions
from kvrelay.core.member import Member, MemberRole
from kvrelay.v1 import inference_pb2 as pb
from tests.gateway.conftest import Bench, Gateway, eventually


def closed_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


async def words_about(address: str, num_attempts: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is logged in `num_attempts` to reach a worker there."""
    attempts = asyncio.Semaphore(0)
    run_session = WorkerSessions._run_session

    async def counting(self: WorkerSessions, session: Any) -> bool:
        greeted = await run_session(self, session)
        attempts.release()
        return greeted

    monkeypatch.setattr(WorkerSessions, "_run_session", counting)
    sessions = WorkerSessions(
        SessionSettings("gateway-1", 1500), lambda *_: None, lambda *_: None, lambda *_: None, lambda: None
    )
    with capture_logs() as lines:
        async with sessions.running():
            sessions.set_members((Member("decode-1", MemberRole.DECODE, address, "model", "fingerprint"),))
            async with asyncio.timeout(60):
                for _ in range(num_attempts):
                    await attempts.acquire()
    return [line for line in lines if line["event"] == "worker cannot be reached"]


async def test_an_unreachable_worker_is_logged_once_with_reason_and_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = closed_address()
    (line,) = await words_about(address, 3, monkeypatch)
    assert (line["log_level"], line["role"], line["address"]) == ("warning", "decode", address)
    assert "refused" in line["reason"]
    assert "--advertise-address" in line["advice"]


async def test_a_name_that_cannot_be_resolved_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = await words_about("kvrelay-decode-7d9c8.invalid:50051", 1, monkeypatch)
    assert "kvrelay-decode-7d9c8.invalid" in line["reason"]


async def test_an_unreachable_worker_is_logged_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_sessions, "LOG_INTERVAL_S", 0.0)
    assert len(await words_about(closed_address(), 2, monkeypatch)) == 2


async def problem_of(gateway: Gateway, worker_id: str) -> str:
    """The gateway's problem with a worker, once it reports one."""

    async def worker() -> pb.WorkerInfo:
        cluster = await gateway.stub.GetCluster(pb.GetClusterRequest())
        return next(worker for worker in cluster.workers if worker.worker_id == worker_id)

    async def told() -> bool:
        return bool((await worker()).problem)

    await eventually(told)
    return (await worker()).problem


async def test_the_cluster_view_says_why_a_worker_is_not_connected(bench: Bench) -> None:
    reached, elsewhere = await bench.workers.add_decode(), await bench.workers.add_prefill()
    elsewhere.address = closed_address()  # the registered one
    await bench.announce(reached, elsewhere)
    gateway = await bench.gateway(num_workers=1)
    problem = await problem_of(gateway, elsewhere.worker_id)
    assert elsewhere.address in problem
    assert "refused" in problem
    assert "--advertise-address" in problem
    workers = (await gateway.stub.GetCluster(pb.GetClusterRequest())).workers
    assert {worker.worker_id: (worker.connected, bool(worker.problem)) for worker in workers} == {
        reached.worker_id: (True, False),
        elsewhere.worker_id: (False, True),
    }
    await reached.kill()  # its lease stays for a while
    assert "--advertise-address" not in await problem_of(gateway, reached.worker_id), "the address was the right one"


async def test_a_workers_problem_is_forgotten_with_the_worker() -> None:
    address = closed_address()
    sessions = WorkerSessions(
        SessionSettings("gateway-1", 1500), lambda *_: None, lambda *_: None, lambda *_: None, lambda: None
    )
    async with sessions.running():
        sessions.set_members((Member("decode-1", MemberRole.DECODE, address, "model", "fingerprint"),))

        async def told() -> bool:
            return "refused" in sessions.problem(MemberRole.DECODE, address)

        async def forgotten() -> bool:
            return not sessions.problem(MemberRole.DECODE, address)

        await eventually(told)
        assert not sessions.problem(MemberRole.PREFILL, address)
        sessions.set_members(())
        await eventually(forgotten)
