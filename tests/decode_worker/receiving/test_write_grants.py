"""Grants: one writer, once, by ticket; blocks are free only when nobody writes."""

import pytest

from decode_worker.receiving.write_grants import WriteGrants
from kvrelay.errors import TicketError
from tests.support.jobs import make_job

JOB = make_job([5, 6, 7], max_tokens=4)


def nothing() -> None:
    pass


def test_a_ticket_opens_its_own_reservation_once() -> None:
    grants = WriteGrants()
    ticket = grants.grant(JOB, (1,), 0)
    grant = grants.start_write(JOB.job_id, ticket, nothing)
    assert (grant.block_ids, grant.token_begin, grant.token_end) == ((1,), 0, 3)
    with pytest.raises(TicketError):
        grants.start_write(JOB.job_id, ticket, nothing)
    grants.finish_write(grant)
    with pytest.raises(TicketError):
        grants.start_write(JOB.job_id, ticket, nothing)
    assert len(grants) == 0


@pytest.mark.parametrize("wrong", [b"", bytes(16), bytes(15), bytes(64)])
def test_another_ticket_opens_nothing_and_uses_nothing_up(wrong: bytes) -> None:
    grants = WriteGrants()
    ticket = grants.grant(JOB, (1,), 0)
    with pytest.raises(TicketError):
        grants.start_write(JOB.job_id, wrong, nothing)
    grants.start_write(JOB.job_id, ticket, nothing)


def test_an_unknown_job_has_no_grant_even_for_a_zero_ticket() -> None:
    with pytest.raises(TicketError):
        WriteGrants().start_write(JOB.job_id, bytes(16), nothing)


def test_closing_before_a_writer_came_frees_at_once_and_kills_the_ticket() -> None:
    grants = WriteGrants()
    ticket = grants.grant(JOB, (1,), 0)
    assert grants.revoke(JOB.job_id)
    with pytest.raises(TicketError):
        grants.start_write(JOB.job_id, ticket, nothing)


def test_closing_under_a_writer_tells_it_once_and_waits_for_its_end() -> None:
    grants = WriteGrants()
    told: list[int] = []
    grant = grants.start_write(JOB.job_id, grants.grant(JOB, (1,), 0), lambda: told.append(1))
    assert not grants.revoke(JOB.job_id)
    assert not grants.revoke(JOB.job_id)
    assert told == [1]
    grants.finish_write(grant)
    assert grants.revoke(JOB.job_id)
