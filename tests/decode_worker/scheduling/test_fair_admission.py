"""Freed blocks and slots go to the share that holds the least, which may also take from others."""

from decode_worker.scheduling.events import BlocksReserved
from decode_worker.scheduling.prompt_turns import PromptTurns
from decode_worker.scheduling.running_sequence import DecodeJob, RunningSequence
from kvrelay.core.job import Job
from kvrelay.worker.sequence import PreparedJob
from tests.decode_worker.scheduling.test_scheduler import Bench, prompt
from tests.support.jobs import make_job


class Shares(Bench):
    """Numbers jobs, and runs those that are reserved at once."""

    num_made = 0

    def ask(self, share: str, num_tokens: int = 4, max_tokens: int = 20, **fields: int) -> Job:
        self.num_made += 1
        request_id = f"{self.num_made:032x}"
        job = make_job(
            prompt(num_tokens, 7 * self.num_made), max_tokens, request_id=request_id, cache_salt=share, **fields
        )
        self.scheduler.reserve(PreparedJob(job))
        return job

    def reserved(self) -> list[Job]:
        return [event.job for event in self.scheduler.drain_events() if isinstance(event, BlocksReserved)]

    def run(self, *jobs: Job) -> None:
        """Their pushes end."""
        for event in self.scheduler.drain_events():
            if isinstance(event, BlocksReserved) and event.job in jobs:
                self.pool.write(event.block_ids, event.job.token_ids, 0, len(event.job.token_ids))
                self.scheduler.run_prompt(event.job.job_id)
        self.step()

    def num_preemptions(self) -> int:
        return self.scheduler.load().num_preemptions


def test_a_share_that_holds_less_takes_a_slot_from_the_one_with_the_most() -> None:
    bench = Shares(num_blocks=64, running=4)
    bench.run(*[bench.ask("greedy") for _ in range(4)])
    assert bench.reserved() == []
    waits, small = bench.ask("greedy"), bench.ask("small")
    assert bench.reserved() == [small], "though the greedy one's came first"
    assert bench.num_preemptions() == 1
    bench.ask("small")
    assert len(bench.reserved()) == 1
    bench.ask("small")
    assert bench.reserved() == [], "it holds as much as the other now"
    assert waits.job_id in bench.scheduler.job_ids()


def test_a_share_that_holds_less_takes_blocks_from_the_one_with_the_most() -> None:
    bench = Shares(num_blocks=16, running=32)
    bench.run(*[bench.ask("greedy", 8) for _ in range(8)])  # two blocks each
    assert bench.reserved() == []
    small = bench.ask("small", 12)
    assert bench.reserved() == [small]
    assert bench.num_preemptions() > 0


def test_freed_room_goes_to_the_share_that_holds_less_though_another_waits_longer() -> None:
    bench = Shares(num_blocks=64, running=2)
    bench.run(bench.ask("greedy"))
    other = bench.ask("other")  # cannot be preempted
    assert bench.reserved() == [other]
    bench.ask("greedy")
    small = bench.ask("small")
    assert bench.reserved() == []
    bench.scheduler.cancel(other.job_id)
    bench.step()
    assert bench.reserved() == [small]


def test_a_share_of_many_blocks_holds_more_than_one_of_many_slots() -> None:
    bench = Shares(num_blocks=16, running=32)
    bench.run(bench.ask("greedy", 40))
    bench.run(*[bench.ask("small", 2) for _ in range(3)])
    other = bench.ask("other", 8)
    assert bench.reserved() == [other]
    bench.ask("greedy", 8)
    small = bench.ask("small", 8)
    assert bench.reserved() == []
    bench.scheduler.cancel(other.job_id)
    bench.step()
    assert bench.reserved() == [small]


def test_a_heavier_share_keeps_more_of_a_full_worker() -> None:
    bench = Shares(num_blocks=64, running=4)
    bench.run(*[bench.ask("heavy", share_weight=3) for _ in range(4)])
    for _ in range(2):
        bench.ask("light")
    assert len(bench.reserved()) == 1, "a second one would give it more than a third of the other's"


def test_one_share_never_preempts_for_a_new_job() -> None:
    bench = Shares(num_blocks=64, running=4)
    for _ in range(4):
        bench.run(bench.ask("only"))
    bench.ask("only")
    assert (bench.reserved(), bench.num_preemptions()) == ([], 0)


def test_preempted_sequences_come_back_when_there_is_room() -> None:
    bench = Shares(num_blocks=64, running=2)
    greedy = [bench.ask("greedy", max_tokens=6) for _ in range(2)]
    bench.run(*greedy)
    small = bench.ask("small", max_tokens=3)
    bench.run(small)
    for _ in range(40):
        bench.step()
    assert bench.num_preemptions() == 1
    assert bench.scheduler.job_ids() == [], "all ended"
    bench.blocks.check_integrity()


def test_nobody_passes_a_share_that_holds_nothing_and_needs_much() -> None:
    """Small jobs of others would take each block that becomes free."""
    bench = Shares(num_blocks=16, running=64)
    bench.run(bench.ask("greedy", 16), bench.ask("greedy", 16))
    bench.run(bench.ask("small", 4))
    poor, passing = bench.ask("poor", 40), bench.ask("small", 4)
    assert bench.reserved() == []
    bench.scheduler.cancel(poor.job_id)
    bench.step()
    assert bench.reserved() == [passing], "there was room for it"


def test_reservations_of_one_share_leave_a_quarter_to_others() -> None:
    """They cannot be preempted."""
    bench = Shares(num_blocks=16, running=64)
    bench.ask("other", 1)
    bench.scheduler.cancel(bench.reserved()[0].job_id)
    greedy = [bench.ask("greedy", 16) for _ in range(4)]  # four blocks each
    assert bench.reserved() == greedy[:3]
    small = bench.ask("small", 8)
    assert bench.reserved() == [small]


def test_reservations_of_the_only_share_may_take_all() -> None:
    bench = Shares(num_blocks=16, running=64)
    greedy = [bench.ask("only", 16) for _ in range(4)]
    assert bench.reserved() == greedy


def test_prompts_of_shares_take_turns_in_a_steps_prompt_tokens() -> None:
    def prompt_of(number: int, share: str, num_tokens: int, weight: int = 1) -> RunningSequence:
        job = make_job(prompt(num_tokens), 4, f"{number:032x}", cache_salt=share, share_weight=weight)
        return RunningSequence(DecodeJob(PreparedJob(job), number), (0,))

    greedy = [prompt_of(number, "greedy", 40) for number in range(5)]
    small = prompt_of(9, "small", 6)
    turns = PromptTurns()
    assert turns.divide(greedy, 8) == {greedy[0]: 8}
    assert turns.divide([*greedy, small], 8) == {small: 6, greedy[0]: 2}
    heavy = PromptTurns()
    pair = [prompt_of(1, "heavy", 40, weight=3), prompt_of(2, "light", 40)]
    given = [heavy.divide(pair, 8) for _ in range(16)]
    assert sum(step.get(pair[0], 0) for step in given) == 3 * sum(step.get(pair[1], 0) for step in given)
