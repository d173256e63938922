"""Leases of jobs: one session and one deadline each, and each comes once.

The newest attempt wins. Only the owner of a request ends another gateway's jobs.
"""

import asyncio

import pytest

from kvrelay.core.job import JobId
from kvrelay.worker import job_leases
from kvrelay.worker.job_leases import MAX_ATTEMPT_JUMP, Claim, JobLeases

MINE, OTHER = "gateway-1", "gateway-2"


class Bench:
    def __init__(self) -> None:
        self.expired: asyncio.Queue[JobId] = asyncio.Queue()
        self.superseded: list[JobId] = []
        self.told: list[object] = []
        """Sessions whose jobs another session superseded."""
        self.leases: JobLeases[object] = JobLeases(self.expired.put_nowait, self._on_superseded)
        self.session = object()

    def begin(self, attempt: int, sequence: int = 0, request_id: str = "r", deadline_ms: int = 60_000) -> bool:
        job_id = JobId(request_id, attempt, sequence)
        return self.leases.begin(job_id, self.session, MINE, deadline_ms) is Claim.BEGUN

    def claim(self, attempt: int, *, session: object = OTHER, gateway_id: str = OTHER, owns: bool = False) -> Claim:
        """Another gateway's attempt."""
        return self.leases.begin(JobId("r", attempt), session, gateway_id, 60_000, owns_request=owns)

    def _on_superseded(self, job_id: JobId, session: object | None) -> None:
        self.superseded.append(job_id)
        if session is not None:
            self.told.append(session)
        self.leases.end(job_id)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_a_newer_attempt_ends_all_jobs_of_older_ones_of_its_request_only(bench: Bench) -> None:
    assert bench.begin(1)
    assert bench.begin(1, request_id="other")
    assert bench.begin(2, 0)
    assert bench.begin(2, 1)
    assert bench.superseded == [JobId("r", 1)]
    assert bench.leases.session_of(JobId("r", 1)) is None
    assert len(bench.leases) == 3


async def test_older_attempts_and_jobs_that_were_here_are_refused_even_after_their_end(bench: Bench) -> None:
    assert bench.begin(2)
    assert not bench.begin(2)
    assert not bench.begin(1)
    assert bench.leases.end(JobId("r", 2))
    assert not bench.begin(2)
    assert not bench.begin(1)
    assert bench.begin(2, 1)
    assert bench.begin(3)


async def test_a_deadline_is_told_once_and_leaves_the_lease_to_be_ended(bench: Bench) -> None:
    assert bench.begin(1, deadline_ms=1)
    assert await asyncio.wait_for(bench.expired.get(), 30) == JobId("r", 1)
    assert bench.leases.session_of(JobId("r", 1)) is bench.session
    assert bench.leases.end(JobId("r", 1))
    assert not bench.leases.end(JobId("r", 1))


async def test_a_session_takes_its_jobs_with_it(bench: Bench) -> None:
    assert bench.begin(1)
    assert bench.leases.begin(JobId("x", 1), "another session", OTHER, 60_000) is Claim.BEGUN
    assert bench.leases.end_session(bench.session) == [JobId("r", 1)]
    assert bench.leases.jobs() == [JobId("x", 1)]


async def test_waiting_ends_with_the_last_job(bench: Bench) -> None:
    await bench.leases.wait_until_empty()
    assert bench.begin(1)
    waiting = asyncio.create_task(bench.leases.wait_until_empty())
    await asyncio.sleep(0)
    assert not waiting.done()
    bench.leases.end(JobId("r", 1))
    await asyncio.wait_for(waiting, 30)


async def test_memory_of_attempts_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_leases, "NUM_REMEMBERED_REQUESTS", 2)
    for name in "abc":
        assert bench.begin(2, request_id=name)
        assert bench.leases.end(JobId(name, 2))
    assert bench.begin(1, request_id="a")
    assert not bench.begin(1, request_id="c")


async def test_another_gateway_ends_running_jobs_only_as_the_owner_and_their_session_is_told(bench: Bench) -> None:
    assert bench.begin(1)
    assert bench.claim(2) is Claim.UNPROVEN
    assert bench.claim(2**32 - 1) is Claim.UNPROVEN
    assert bench.leases.session_of(JobId("r", 1)) is bench.session
    assert bench.begin(2), "nothing of the stranger's numbers was kept"
    assert bench.told == []
    assert bench.claim(3, owns=True) is Claim.BEGUN
    assert bench.superseded == [JobId("r", 1), JobId("r", 2)]
    assert bench.told == [bench.session]
    assert not bench.begin(4), "the request is the other gateway's now"


async def test_another_session_of_the_same_gateway_goes_on_and_the_first_is_told(bench: Bench) -> None:
    assert bench.begin(1)
    assert bench.claim(2, session="reconnected", gateway_id=MINE) is Claim.BEGUN
    assert bench.told == [bench.session]


async def test_a_request_without_jobs_goes_on_at_another_gateway_with_a_newer_attempt(bench: Bench) -> None:
    assert bench.begin(2)
    assert bench.leases.end(JobId("r", 2))
    assert bench.claim(2) is Claim.UNPROVEN
    assert bench.claim(1) is Claim.UNPROVEN
    assert bench.claim(3) is Claim.BEGUN


async def test_attempts_far_ahead_do_not_shut_the_owner_out(bench: Bench) -> None:
    assert bench.claim(MAX_ATTEMPT_JUMP + 1) is Claim.UNPROVEN
    assert bench.claim(MAX_ATTEMPT_JUMP) is Claim.BEGUN
    assert bench.claim(2 * MAX_ATTEMPT_JUMP + 1) is Claim.UNPROVEN
    assert not bench.begin(2)
    assert bench.claim(2, session=bench.session, gateway_id=MINE, owns=True) is Claim.BEGUN
    assert bench.told == [OTHER]
    assert bench.begin(3)


async def test_a_job_that_the_engine_still_has_does_not_begin_again_even_for_the_owner(bench: Bench) -> None:
    assert bench.begin(3)
    bench.leases.release(JobId("r", 3))
    assert bench.leases.session_of(JobId("r", 3)) is None
    assert bench.claim(3, owns=True) is Claim.SUPERSEDED
    bench.leases.end(JobId("r", 3))
    assert bench.claim(3, owns=True) is Claim.BEGUN


async def test_jobs_of_a_session_are_counted(bench: Bench) -> None:
    assert bench.begin(1)
    assert bench.begin(1, 1)
    assert bench.leases.num_jobs_of(bench.session) == 2
    bench.leases.end_session(bench.session)
    assert bench.leases.num_jobs_of(bench.session) == 0
