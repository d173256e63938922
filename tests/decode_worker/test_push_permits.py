"""Permits: one writer, once, by ticket; blocks are free only when nobody writes."""

import pytest

from decode_worker.push_permits import PushPermits
from kvrelay.errors import TicketError
from tests.works import make_work

WORK = make_work([5, 6, 7], max_tokens=4)


def nothing() -> None:
    pass


def test_a_ticket_opens_its_own_reservation_once() -> None:
    permits = PushPermits()
    ticket = permits.open(WORK, (1,), 0)
    permit = permits.begin(WORK.work_id, ticket, nothing)
    assert (permit.block_ids, permit.token_begin, permit.token_end) == ((1,), 0, 3)
    with pytest.raises(TicketError):
        permits.begin(WORK.work_id, ticket, nothing)
    permits.end(permit)
    with pytest.raises(TicketError):
        permits.begin(WORK.work_id, ticket, nothing)
    assert len(permits) == 0


@pytest.mark.parametrize("wrong", [b"", bytes(16), bytes(15), bytes(64)])
def test_another_ticket_opens_nothing_and_uses_nothing_up(wrong: bytes) -> None:
    permits = PushPermits()
    ticket = permits.open(WORK, (1,), 0)
    with pytest.raises(TicketError):
        permits.begin(WORK.work_id, wrong, nothing)
    permits.begin(WORK.work_id, ticket, nothing)


def test_an_unknown_work_has_no_permit_even_for_a_zero_ticket() -> None:
    with pytest.raises(TicketError):
        PushPermits().begin(WORK.work_id, bytes(16), nothing)


def test_closing_before_a_writer_came_frees_at_once_and_kills_the_ticket() -> None:
    permits = PushPermits()
    ticket = permits.open(WORK, (1,), 0)
    assert permits.close(WORK.work_id)
    with pytest.raises(TicketError):
        permits.begin(WORK.work_id, ticket, nothing)


def test_closing_under_a_writer_tells_it_once_and_waits_for_its_end() -> None:
    permits = PushPermits()
    told: list[int] = []
    permit = permits.begin(WORK.work_id, permits.open(WORK, (1,), 0), lambda: told.append(1))
    assert not permits.close(WORK.work_id)
    assert not permits.close(WORK.work_id)
    assert told == [1]
    permits.end(permit)
    assert permits.close(WORK.work_id)
