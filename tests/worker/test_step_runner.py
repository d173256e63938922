"""The step runner with sampler, scheduler and block manager over a model of a few lines:
speculation changes no output.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.events import BlocksReserved
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from decode_worker.scheduling.speculation import SpeculationLimits
from kvrelay.core.job import FinishReason, Job, SequenceToken
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager
from kvrelay.worker.commands import JobFailed
from kvrelay.worker.sequence import PreparedJob
from kvrelay.worker.step_runner import StepRunner
from tests.support.jobs import make_job

VOCAB_SIZE = 40
BLOCK_SIZE = 4
EOS = 3
SPEC = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), VOCAB_SIZE, 96, (EOS,), "f")


class TokenPool:
    """The KV cache of a model whose keys are its tokens."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks: list[list[int]] = [[-1] * BLOCK_SIZE for _ in range(num_blocks)]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self.blocks[copy.target] = list(self.blocks[copy.source])


@dataclass
class _Model:
    spec: ModelSpec


class TokenModelRunner:
    """Logits from the tokens found in the blocks: mostly of the last one alone, so that texts
    repeat; now and then of all.
    """

    def __init__(self, num_blocks: int) -> None:
        self.model = _Model(SPEC)
        self.cache = TokenPool(num_blocks)
        self.table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 3
        self.table[:, EOS] += 1.0

    def run(self, batch: Sequence[SequenceInput], on_layer_written: Callable[[int], None] | None = None) -> Tensor:
        for item in batch:
            for position, token_id in enumerate(item.token_ids, item.position):
                self.cache.blocks[item.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token_id
        rows = [row for item in batch for row in self._rows(item)]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def _rows(self, item: SequenceInput) -> list[Tensor]:
        end = item.position + len(item.token_ids)
        tokens = [
            self.cache.blocks[item.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE] for position in range(end)
        ]
        assert min(tokens) >= 0, "KV that was never written"
        return [self._logits(tokens[: end - back]) for back in reversed(range(item.num_logits))]

    def _logits(self, tokens: list[int]) -> Tensor:
        value = zlib.crc32(bytes(tokens))
        return self.table[value // 9 % VOCAB_SIZE if value % 9 == 0 else tokens[-1]]


class Engine:
    """A decode worker without processes."""

    def __init__(self, num_blocks: int, speculation: SpeculationLimits | None) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        limits = DecodeLimits(32, 32, 100, 8)
        self.scheduler = DecodeScheduler(self.blocks, limits, WriteGrants(), speculation)
        self.runner = StepRunner(TokenModelRunner(num_blocks))  # type: ignore[arg-type]
        self.tokens: dict[tuple[str, int], list[SequenceToken]] = {}
        self.num_steps = 0

    def start(self, job: Job) -> None:
        self.scheduler.reserve(PreparedJob(job))
        self._drain_events()

    def step(self) -> bool:
        step = self.scheduler.schedule()
        self._drain_events()
        if step is None:
            return False
        self.num_steps += 1
        tokens = self.runner.run(step)
        for token in tokens:
            output = self.tokens.setdefault((token.job_id.request_id, token.sequence), [])
            assert not output or output[-1].finish_reason is None, "a token behind the last one"
            assert token.index == len(output)
            output.append(token)
        self.scheduler.complete(step, tokens)
        self._drain_events()
        self.blocks.check_integrity()
        return True

    def finish(self) -> None:
        while self.step():
            pass
        assert not self.scheduler.job_ids()
        assert self.blocks.num_used_blocks == 0

    def _drain_events(self) -> None:
        for event in self.scheduler.drain_events():
            assert not isinstance(event, JobFailed)
            if isinstance(event, BlocksReserved):
                self.scheduler.run_prompt(event.job.job_id)


def job(number: int, *, prompt: Sequence[int] = (7, 8, 9, 10, 11), num_sequences: int = 1, **sampling: Any) -> Job:
    values = {"max_tokens": 60, "seed": 11 + number, "ignore_eos": True, "n": num_sequences} | sampling
    return make_job(list(prompt), 1, f"{number:032x}", sampling=SamplingParams(**values), num_sequences=num_sequences)


SPECULATION = SpeculationLimits(max_draft_tokens=6, max_rows=40, max_sequence_tokens=SPEC.max_context_tokens)

GREEDY: dict[str, Any] = {"temperature": 0.0}
COOL: dict[str, Any] = {"temperature": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "greedy with log probabilities": {**GREEDY, "logprobs": 3},
    "sampled": COOL,
    "sampled from the likeliest": {**COOL, "top_k": 8, "top_p": 0.9, "min_p": 0.01, "logprobs": 0},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.05},
    "frequency penalty": {**GREEDY, "frequency_penalty": 0.2},
    "presence penalty, sampled": {**COOL, "presence_penalty": 0.5},
    "frequency penalty that favours": {**COOL, "frequency_penalty": -0.1},
    "end of sequence": {"temperature": 0.7, "ignore_eos": False},
    "no end before min_tokens": {**COOL, "ignore_eos": False, "min_tokens": 25, "temperature": 0.8},
    "stop tokens": {"temperature": 0.7, "stop_token_ids": (5, 17)},
    "logit bias": {**GREEDY, "logit_bias": {5: 2.0, 9: -3.0}},
    "until the context ends": {**COOL, "max_tokens": 500},
    "max_tokens 1": {**GREEDY, "max_tokens": 1},
    "max_tokens 2": {**GREEDY, "max_tokens": 2},
}


def outputs(jobs: Sequence[Job], speculation: SpeculationLimits | None, num_blocks: int = 200) -> Engine:
    engine = Engine(num_blocks, speculation)
    for one in jobs:
        engine.start(one)
    engine.finish()
    return engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_speculation_gives_the_same_tokens(variant: str) -> None:
    """With their log probabilities and finish reasons."""
    jobs = [job(number, num_sequences=1 + number % 3, **VARIANTS[variant]) for number in range(6)]
    plain, guessing = outputs(jobs, None), outputs(jobs, SPECULATION)
    assert guessing.tokens == plain.tokens
    assert plain.scheduler.load().num_drafted_tokens == 0
    if not variant.startswith("max_tokens"):
        load = guessing.scheduler.load()
        assert 0 < load.num_accepted_tokens < load.num_drafted_tokens, "right and wrong guesses"
        assert sum(map(len, plain.tokens.values())) == sum(map(len, guessing.tokens.values()))


def test_finish_reasons_of_all_kinds_occur() -> None:
    reasons = {
        (variant, token.finish_reason)
        for variant in ("end of sequence", "stop tokens", "until the context ends")
        for output in outputs([job(number, **VARIANTS[variant]) for number in range(6)], SPECULATION).tokens.values()
        for token in output[-1:]
    }
    assert ("end of sequence", FinishReason.STOP) in reasons
    assert ("stop tokens", FinishReason.STOP) in reasons
    assert ("until the context ends", FinishReason.LENGTH) in reasons


def test_the_same_with_preemptions() -> None:
    jobs = [job(number, **(COOL if number % 2 else GREEDY)) for number in range(6)]
    expected = outputs(jobs, None).tokens
    for num_blocks in (17, 23, 31):
        cramped = outputs(jobs, SPECULATION, num_blocks)
        assert cramped.tokens == expected
        assert cramped.scheduler.load().num_preemptions > 0
        assert cramped.scheduler.load().num_accepted_tokens > 0


def test_no_sequence_is_preempted_for_a_guess() -> None:
    """Two sequences that just fit: their drafts would not."""
    jobs = [job(number, max_tokens=23, **GREEDY) for number in range(2)]
    tight = outputs(jobs, SPECULATION, num_blocks=14)
    assert tight.scheduler.load().num_preemptions == 0
    assert tight.scheduler.load().num_accepted_tokens > 0
    assert tight.tokens == outputs(jobs, None).tokens


def test_the_same_when_others_are_cancelled_or_finished_in_the_middle() -> None:
    jobs = [job(number, num_sequences=2, **COOL) for number in range(4)]
    expected = outputs(jobs, None).tokens
    engine = Engine(200, SPECULATION)
    for one in jobs:
        engine.start(one)
    for _ in range(6):
        engine.step()
    engine.scheduler.cancel(jobs[1].job_id)
    engine.scheduler.finish_sequence(jobs[2].job_id, 1)
    engine.finish()
    for (request_id, number), output in engine.tokens.items():
        whole = expected[request_id, number]
        assert output == whole[: len(output)]
        is_ended = request_id == jobs[1].job_id.request_id or (request_id, number) == (jobs[2].job_id.request_id, 1)
        assert (len(output) < len(whole)) is is_ended


def test_wrong_guesses_never_reach_the_prefix_cache() -> None:
    """A second turn finds what the first one said, and continues as without any cache."""
    first = [job(number, max_tokens=41, **COOL) for number in range(4)]
    engine = outputs(first, SPECULATION)
    following = []
    for number, one in enumerate(first):
        said = [token.token.token_id for token in engine.tokens[one.job_id.request_id, 0]]
        following.append(job(10 + number, prompt=[*one.token_ids, *said, 12], max_tokens=20, **GREEDY))
    for one in following:
        engine.start(one)
    assert engine.scheduler.load().num_prefix_hit_tokens >= 4 * 44
    engine.finish()
    fresh = outputs(following, None)
    assert {key: engine.tokens[key] for key in fresh.tokens} == fresh.tokens


def test_a_repetitive_text_takes_few_steps() -> None:
    """Of a model that always says the same behind the same token."""
    engine = Engine(200, SPECULATION)
    runner: Any = engine.runner._runner
    runner._logits = lambda tokens: runner.table[tokens[-1]]
    engine.start(job(0, max_tokens=80, **GREEDY))
    engine.finish()
    load = engine.scheduler.load()
    assert len(engine.tokens[f"{0:032x}", 0]) == 80
    assert engine.num_steps == 80 - load.num_accepted_tokens
    assert engine.num_steps < 40
    assert load.num_accepted_tokens > 0.8 * load.num_drafted_tokens


def test_a_full_step_has_no_guesses() -> None:
    jobs = [job(number, **GREEDY) for number in range(8)]
    engine = outputs(jobs, SpeculationLimits(6, 8, SPEC.max_context_tokens))
    alone = outputs(jobs[:2], SpeculationLimits(6, 8, SPEC.max_context_tokens))
    assert engine.scheduler.load().num_drafted_tokens == 0
    assert alone.scheduler.load().num_drafted_tokens > 0
