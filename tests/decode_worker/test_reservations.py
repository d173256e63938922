"""Reservations: all blocks of a prompt or none, in order, and none freed under a writer."""

from decode_worker.scheduling.reservations import Reservations
from decode_worker.scheduling.running_sequence import DecodeJob, Phase
from kvrelay.core.job import JobId
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.worker.sequence import PreparedJob
from tests.support.jobs import make_job


class Writers:
    def __init__(self) -> None:
        self.writing: set[JobId] = set()

    def revoke(self, job_id: JobId) -> bool:
        return job_id not in self.writing

    def is_unused(self, job_id: JobId) -> bool:
        return job_id not in self.writing


def waiting_job(reservations: Reservations, age: int, num_tokens: int, holder: int = 0) -> DecodeJob:
    job = DecodeJob(PreparedJob(make_job([age] * num_tokens, 2, request_id=f"{age:032x}", holder=holder)), age)
    reservations.add(job)
    return job


def test_a_prompt_gets_all_its_blocks_or_none() -> None:
    blocks = BlockManager(4, 4)
    reservations = Reservations(blocks, Writers())
    first, second = waiting_job(reservations, 1, 12), waiting_job(reservations, 2, 8)
    assert reservations.reserve(first)
    assert first.prompt_table is not None
    assert not reservations.reserve(second)
    assert (reservations.next_of(""), second.phase, blocks.num_used_blocks) == (second, Phase.WAITING, 3)
    reservations.release(first)
    assert reservations.reserve(second)
    assert second.prompt_table is not None
    assert reservations.shares == set()
    assert second.phase is Phase.RESERVED


def test_a_job_is_not_taken_back_under_a_writer() -> None:
    writers = Writers()
    reservations = Reservations(BlockManager(4, 4), writers)
    reserved, waiting = waiting_job(reservations, 1, 4), waiting_job(reservations, 2, 4)
    reservations.reserve(reserved)
    writers.writing = {reserved.job_id, waiting.job_id}
    assert not reservations.withdraw(reserved)
    assert reservations.withdraw(waiting), "it has no blocks to write into"
    assert reservations.num_waiting == 0
    writers.writing.clear()
    assert reservations.withdraw(reserved)


def test_the_batch_takes_the_blocks_over() -> None:
    blocks = BlockManager(4, 4)
    reservations = Reservations(blocks, Writers())
    job = waiting_job(reservations, 1, 4)
    assert reservations.reserve(job)
    table = job.prompt_table
    assert reservations.claim(job) is table
    assert (job.phase, job.prompt_table) == (Phase.RUNNING, None)
    reservations.release(job)
    assert blocks.num_used_blocks == 1, "they are the batch's now"


def test_the_holder_of_most_unused_blocks_gives_its_youngest_back_for_others() -> None:
    writers = Writers()
    reservations = Reservations(BlockManager(8, 4), writers)
    greedy, other = 1, 2
    first, second, third = (
        waiting_job(reservations, *each) for each in ((1, 8, greedy), (2, 8, greedy), (3, 8, other))
    )
    for job in (first, second, third):
        assert reservations.reserve(job)
    own, _ = waiting_job(reservations, 4, 16, greedy), waiting_job(reservations, 5, 16, other)
    idle, waiting = [first, second, third], reservations.waiting
    assert reservations.to_yield(idle, waiting) == [second, own], "the session's own job waits ahead"
    writers.writing = {second.job_id}
    assert reservations.to_yield(idle, waiting) == [], "a push writes, so both hold as much"
    assert reservations.to_yield([first], waiting) == [first, own]
