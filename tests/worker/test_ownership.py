"""Questions to Redis about a request's owner are few, and each ends in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvrelay.worker import ownership
from kvrelay.worker.ownership import MAX_QUESTIONS, OwnershipChecks
from tests.support.jobs import make_job


class Sink:
    gateway_id = "g"

    def send(self, **message: Any) -> None:
        """Has no reader."""


class Silent:
    """Redis does not answer."""

    num_questions = 0

    async def owner_of(self, request_id: str) -> str | None:
        self.num_questions += 1
        await asyncio.Event().wait()
        return None


async def test_more_questions_than_there_may_be_are_not_asked() -> None:
    owners, sink = Silent(), Sink()
    checks, answers = OwnershipChecks(owners), list[bool | None]()
    for number in range(MAX_QUESTIONS + 5):
        checks.ask(sink, "g", make_job([5], 2, request_id=f"{number:032x}"), answers.append)
    await asyncio.sleep(0)
    assert (owners.num_questions, answers) == (MAX_QUESTIONS, [None] * 5)
    checks.cancel_all(sink)


async def test_a_question_that_is_not_answered_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "QUESTION_TIMEOUT_S", 0.01)
    answer: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
    OwnershipChecks(Silent()).ask(Sink(), "g", make_job([5], 2), answer.set_result)
    assert await asyncio.wait_for(answer, 60) is None


@pytest.mark.parametrize(("owner", "is_owner"), [("g", True), ("another", False), (None, None)])
async def test_only_the_owner_proves_itself(owner: str | None, is_owner: bool | None) -> None:
    class Known:
        async def owner_of(self, request_id: str) -> str | None:
            return owner

    answer: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
    OwnershipChecks(Known()).ask(Sink(), "g", make_job([5], 2), answer.set_result)
    assert await asyncio.wait_for(answer, 60) is is_owner


async def test_without_redis_nothing_is_proven() -> None:
    answers: list[bool | None] = []
    OwnershipChecks().ask(Sink(), "g", make_job([5], 2), answers.append)
    assert answers == [None]
