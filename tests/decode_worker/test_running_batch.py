"""Running batch: who gives way, who comes back first, and what shared prompts become."""

from typing import Any

from decode_worker.scheduling.running_batch import RunningBatch
from decode_worker.scheduling.running_sequence import DecodeJob, Phase, RunningSequence
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.worker.sequence import PreparedJob
from tests.support.jobs import make_job
from tests.support.simulated_pool import make_token

PROMPT = [5, 6, 7, 8]


def running_job(
    batch: RunningBatch, blocks: BlockManager, age: int, num_sequences: int = 1, **fields: Any
) -> DecodeJob:
    """A job in the batch with one sequence for all, whose prompt fills a block."""
    spec = make_job([age, *PROMPT[1:]], 8, request_id=f"{age:032x}", num_sequences=num_sequences, **fields)
    job = DecodeJob(PreparedJob(spec), age, Phase.RUNNING)
    batch.add(RunningSequence(job, tuple(spec.sequences)), blocks.allocate(spec.token_ids, ""), len(PROMPT))
    return job


def test_the_youngest_gives_way_and_the_oldest_comes_back_first() -> None:
    blocks = BlockManager(3, 4, enable_prefix_cache=False)
    batch = RunningBatch(blocks)
    oldest, middle, youngest = (running_job(batch, blocks, age).sequences[0] for age in (1, 2, 3))
    for sequence in (oldest, middle, youngest):
        sequence.append(9)
    assert batch.grow(oldest) == []
    assert list(batch.preempted) == [youngest]
    assert batch.grow(middle) is None, "none is younger"
    assert list(batch.preempted) == [middle, youngest]
    assert batch.next_preempted("") is middle
    assert not batch.readmit(middle), "the one free block holds no sequence of five tokens"
    batch.remove(oldest)
    assert batch.readmit(middle)
    assert not batch.readmit(youngest), "one block is left for the youngest"
    assert list(batch.running) == [middle]
    assert middle.num_computed_tokens == 0
    assert batch.num_preemptions == 2
    batch.remove(middle)
    assert batch.readmit(youngest)
    batch.remove(youngest)
    assert blocks.num_used_blocks == 0


def test_the_share_with_the_most_blocks_gives_way() -> None:
    blocks = BlockManager(4, 4, enable_prefix_cache=False)
    batch = RunningBatch(blocks)
    greedy = [running_job(batch, blocks, age, cache_salt="greedy").sequences[0] for age in (1, 2, 3)]
    small = running_job(batch, blocks, 4, cache_salt="small").sequences[0]
    small.append(9)
    assert batch.grow(small) == []
    assert list(batch.preempted) == [greedy[2]], "older than the small one, but of the larger share"
    assert batch.next_preempted("small") is None


def test_a_share_of_more_weight_may_hold_more_before_it_gives_way() -> None:
    blocks = BlockManager(4, 4, enable_prefix_cache=False)
    batch = RunningBatch(blocks)
    heavy = [running_job(batch, blocks, age, cache_salt="heavy", share_weight=4).sequences[0] for age in (1, 2)]
    light = [running_job(batch, blocks, age, cache_salt="light").sequences[0] for age in (3, 4)]
    heavy[0].append(9)
    assert batch.grow(heavy[0]) == []
    assert list(batch.preempted) == [light[1]]


def test_sequences_that_share_a_prompt_go_on_over_its_blocks() -> None:
    blocks = BlockManager(8, 4)
    batch = RunningBatch(blocks)
    job = running_job(batch, blocks, 1, num_sequences=3)
    [shared] = job.sequences
    batch.split(shared, [make_token(job.spec, number, job.spec.token_ids) for number in job.spec.sequences])
    assert [sequence.sequence_ids for sequence in batch.running] == [(0,), (1,), (2,)]
    assert blocks.num_used_blocks == 1
    for sequence in list(job.sequences):
        batch.remove(sequence)
    assert blocks.num_used_blocks == 0


def test_a_job_whose_sequences_have_all_ended_leaves_no_block() -> None:
    blocks = BlockManager(8, 4)
    batch = RunningBatch(blocks)
    job = DecodeJob(PreparedJob(make_job(PROMPT, 1)), 1, Phase.RUNNING)
    batch.start_all(job, blocks.allocate(PROMPT, ""), [make_token(job.spec, 0, PROMPT)])
    assert job.sequences == []
    assert blocks.num_used_blocks == 0
