import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from kvrelay.core.sampling_params import SamplingParams
from kvrelay.engine import sampler, truncation
from kvrelay.engine.sampler import SamplingInput, sample, uniform
from kvrelay.errors import InternalError

VOCAB_SIZE = 12
NUM_DRAWS = 4000


def item(
    index: int = 0,
    *,
    sequence: int = 0,
    prompt: list[int] | None = None,
    counts: Mapping[int, int] | None = None,
    ending: frozenset[int] = frozenset(),
    **sampling: Any,
) -> SamplingInput:
    return SamplingInput(SamplingParams(**{"seed": 7, **sampling}), sequence, index, prompt or [], counts or {}, ending)


def row(*values: float) -> torch.Tensor:
    """Logits of one row; tokens that are not named are unlikely."""
    return torch.tensor([[*values, *([-20.0] * (VOCAB_SIZE - len(values)))]])


def choose(logits: torch.Tensor, one: SamplingInput) -> int:
    return sample(logits, [one])[0].token_id


def frequencies(logits: torch.Tensor, **sampling: Any) -> list[float]:
    """How often each token comes in NUM_DRAWS draws of one row."""
    inputs = [item(index, **sampling) for index in range(NUM_DRAWS)]
    counts = Counter(token.token_id for token in sample(logits.expand(NUM_DRAWS, -1), inputs))
    return [counts[token_id] / NUM_DRAWS for token_id in range(logits.shape[1])]


class TestGreedy:
    def test_takes_the_likeliest(self) -> None:
        logits = torch.randn(5, VOCAB_SIZE)
        tokens = sample(logits, [item(temperature=0.0) for _ in range(5)])
        assert [token.token_id for token in tokens] == logits.argmax(dim=-1).tolist()
        assert all(token.logprob is None and token.top_logprobs == () for token in tokens)

    @pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.7])
    def test_a_repetition_penalty_of_almost_nothing_is_no_defect_of_the_model(self, temperature: float) -> None:
        logits = row(1.0, 0.0, -3.0)
        for penalty in (1e-45, 1e-38, 1e-10):
            one = item(prompt=[0, 1, 2], temperature=temperature, repetition_penalty=penalty, logprobs=2)
            assert choose(logits, one) == 0

    def test_needs_no_seed(self) -> None:
        assert choose(row(1.0, 2.0), item(temperature=0.0, seed=None)) == 1

    def test_does_not_change_the_logits(self) -> None:
        logits = torch.randn(3, VOCAB_SIZE)
        before = logits.clone()
        sample(logits, [item(temperature=0.0, logit_bias={0: 5.0}), item(top_k=2), item(temperature=0.5)])
        assert torch.equal(logits, before)

    def test_no_rows_give_no_tokens(self) -> None:
        assert sample(torch.empty(0, VOCAB_SIZE), []) == []


class TestDistribution:
    LOGITS = row(2.0, 1.0, 0.5, 0.0, -1.0)

    def expected(self, temperature: float = 1.0, kept: int = VOCAB_SIZE) -> list[float]:
        logits = self.LOGITS[0] / temperature
        logits[kept:] = -math.inf
        values: list[float] = logits.softmax(dim=-1).tolist()
        return values

    @pytest.mark.parametrize(
        ("sampling", "kept"),
        [
            ({}, VOCAB_SIZE),
            ({"temperature": 0.5}, VOCAB_SIZE),
            ({"temperature": 3.0}, VOCAB_SIZE),
            ({"top_k": 3}, 3),
            ({"top_k": 1}, 1),
            ({"top_k": 10**6}, VOCAB_SIZE),
            # Probabilities are 0.563, 0.207, 0.126, 0.076, 0.028.
            ({"top_p": 0.5}, 1),
            ({"top_p": 0.6}, 2),
            ({"top_p": 0.8}, 3),
            ({"top_p": 0.9}, 4),
            ({"top_p": 1e-9}, 1),
            ({"min_p": 0.3}, 2),
            ({"min_p": 0.2}, 3),
            ({"min_p": 1.0}, 1),
            # Of the three likeliest, 0.63, 0.23 and 0.14, two reach 0.8; without top-k it would
            # take three.
            ({"top_k": 3, "top_p": 0.8}, 2),
            ({"top_k": 4, "min_p": 0.2}, 3),
            ({"top_k": 2, "top_p": 0.99, "min_p": 0.01}, 2),
            ({"temperature": 2.0, "top_p": 0.6}, 2),
        ],
    )
    def test_is_that_of_the_kept_tokens(self, sampling: dict[str, Any], kept: int) -> None:
        actual = frequencies(self.LOGITS, **sampling)
        for ours, theirs in zip(actual, self.expected(sampling.get("temperature", 1.0), kept), strict=True):
            # Four standard deviations.
            assert abs(ours - theirs) <= 4 * math.sqrt(theirs * (1 - theirs) / NUM_DRAWS) + 1e-12

    def test_tokens_that_tie_with_the_last_one_kept_are_kept(self) -> None:
        actual = frequencies(row(3.0, 1.0, 1.0, 1.0), top_k=2)
        assert all(share > 0 for share in actual[:4])
        assert not any(actual[4:])

    @pytest.mark.parametrize("steps", [(), (2,), (5, 100)])
    def test_top_p_looks_beyond_the_first_candidates(
        self, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logits = torch.randn(200, 300)
        inputs = [item(index, top_p=0.95, min_p=0.001) for index in range(200)]
        expected = sample(logits, inputs)
        monkeypatch.setattr(truncation, "CANDIDATE_STEPS", steps)
        assert sample(logits, inputs) == expected

    def test_a_flat_vocabulary_is_drawn_evenly(self) -> None:
        actual = frequencies(torch.zeros(1, VOCAB_SIZE))
        assert all(abs(share - 1 / VOCAB_SIZE) < 0.02 for share in actual)

    @pytest.mark.parametrize("temperature", [1e-6, 1e-300])
    def test_a_tiny_temperature_is_greedy(self, temperature: float) -> None:
        assert frequencies(self.LOGITS, temperature=temperature)[0] == 1.0

    def test_a_token_without_weight_is_never_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
        for value in (0.0, 1.0 - 2.0**-53):
            monkeypatch.setattr(sampler, "uniform", lambda seed, sequence, index, value=value: value)
            assert choose(logits, item()) in (1, 2)


class TestAgainstSorting:
    """The same by sorting the whole vocabulary in float64, one row after another."""

    @pytest.mark.parametrize(
        "sampling",
        [
            {},
            {"temperature": 0.4},
            {"top_k": 1},
            {"top_k": 50},
            {"top_k": 70},
            {"top_k": 900, "top_p": 0.99},
            {"top_p": 0.3},
            {"top_p": 0.95},
            {"top_p": 0.999, "temperature": 2.0},
            {"min_p": 0.05},
            {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
        ],
    )
    @pytest.mark.parametrize("vocab_size", [1024, 1000])
    def test_the_same_tokens_are_chosen(self, sampling: dict[str, Any], vocab_size: int) -> None:
        logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(1)) * 2
        inputs = [item(index, **sampling) for index in range(64)]
        expected = [self.choose(logits[index], inputs[index].sampling, index) for index in range(64)]
        assert [token.token_id for token in sample(logits, inputs)] == expected

    def choose(self, logits: torch.Tensor, sampling: SamplingParams, index: int) -> int:
        probabilities = (logits.double() / sampling.temperature).softmax(dim=-1)
        order = probabilities.argsort(descending=True).tolist()
        kept = order[: sampling.top_k or len(order)]
        # one by one they would be tensors, which takes a hundred times as long
        values = probabilities.tolist()
        mass, needed = 0.0, sampling.top_p * float(probabilities[kept].sum())
        if sampling.top_p < 1.0:
            for number, token_id in enumerate(kept):
                mass += values[token_id]
                if mass >= needed:
                    kept = kept[: number + 1]
                    break
        kept = [token_id for token_id in kept if values[token_id] >= sampling.min_p * values[order[0]]]
        cumulated = torch.zeros_like(probabilities).index_put((torch.tensor(kept),), probabilities[kept]).cumsum(dim=-1)
        target = uniform(7, 0, index) * float(cumulated[-1])
        return int((cumulated <= target).sum())


class TestPenalties:
    def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output(self) -> None:
        greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 2.0}
        assert choose(row(4.0, 2.5), item(prompt=[0], **greedy)) == 1
        assert choose(row(4.0, 2.5), item(counts={0: 1}, **greedy)) == 1
        assert choose(row(4.0, 1.5), item(prompt=[0], **greedy)) == 0
        assert choose(row(-1.0, -1.5), item(prompt=[0], **greedy)) == 1
        assert choose(row(4.0, 3.0), item(prompt=[0, 1], **greedy)) == 0
        # Once, however often it was seen.
        assert choose(row(4.0, 1.5), item(prompt=[0, 0, 0], counts={0: 5}, **greedy)) == 0

    def test_presence_counts_once_and_only_output(self) -> None:
        greedy: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 1.0}
        assert choose(row(2.0, 1.5), item(counts={0: 1}, **greedy)) == 1
        assert choose(row(3.0, 1.5), item(counts={0: 9}, **greedy)) == 0
        assert choose(row(2.0, 1.5), item(prompt=[0], **greedy)) == 0

    def test_frequency_counts_every_time(self) -> None:
        greedy: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 0.5}
        assert choose(row(3.0, 1.6), item(counts={0: 2}, **greedy)) == 0
        assert choose(row(3.0, 1.6), item(counts={0: 3}, **greedy)) == 1
        assert choose(row(3.0, 2.9), item(counts={0: 1, 1: 1}, **greedy)) == 0

    def test_a_negative_penalty_favours(self) -> None:
        assert choose(row(2.0, 1.5), item(counts={1: 1}, temperature=0.0, presence_penalty=-1.0)) == 1

    def test_bias_is_added(self) -> None:
        assert choose(row(2.0, 1.0), item(temperature=0.0, logit_bias={1: 1.5})) == 1
        assert choose(row(2.0, 1.0), item(temperature=0.0, logit_bias={0: -100.0, 5: 0.5})) == 1

    def test_ids_beyond_the_vocabulary_are_passed_over(self) -> None:
        one = item(
            temperature=0.0,
            prompt=[999],
            counts={998: 1},
            logit_bias={997: 100.0},
            repetition_penalty=1.5,
            presence_penalty=1.0,
            min_tokens=1,
            ending=frozenset({996}),
        )
        assert choose(row(2.0, 1.0), one) == 0

    def test_apply_to_their_own_row_only(self) -> None:
        logits = row(2.0, 1.5).expand(3, -1)
        inputs = [item(temperature=0.0), item(temperature=0.0, logit_bias={0: -9.0}), item(temperature=0.0)]
        assert [token.token_id for token in sample(logits, inputs)] == [0, 1, 0]


class TestMinTokens:
    @pytest.mark.parametrize(("index", "expected"), [(0, 1), (1, 1), (2, 0), (3, 0)])
    def test_no_ending_before_them(self, index: int, expected: int) -> None:
        assert choose(row(5.0, 1.0), item(index, temperature=0.0, min_tokens=2, ending=frozenset({0}))) == expected

    def test_holds_against_a_bias_and_when_sampling(self) -> None:
        one = item(min_tokens=1, ending=frozenset({0, 2}), logit_bias={0: 100.0})
        assert choose(row(5.0, 1.0, 4.0), one) == 1


class TestLogprobs:
    def test_are_the_model_s_own(self) -> None:
        logits = torch.randn(1, VOCAB_SIZE)
        one = item(temperature=0.0, logprobs=3, logit_bias={4: 50.0})
        token = sample(logits, [one])[0]
        expected = logits.log_softmax(dim=-1)[0]
        assert token.token_id == 4
        assert token.logprob == pytest.approx(expected[4].item())
        best = expected.topk(3)
        assert [top.token_id for top in token.top_logprobs] == best.indices.tolist()
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(best.values.tolist())

    def test_come_only_for_rows_that_asked_and_as_many_as_asked(self) -> None:
        tokens = sample(torch.randn(4, VOCAB_SIZE), [item(), item(logprobs=0), item(logprobs=2), item(logprobs=20)])
        assert tokens[0].logprob is None
        assert [len(token.top_logprobs) for token in tokens] == [0, 0, 2, VOCAB_SIZE]
        assert all(token.logprob is not None for token in tokens[1:])


class TestDeterminism:
    VARIANTS: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 40},
        {"top_k": 3, "min_p": 0.05, "temperature": 1.3},
        {"repetition_penalty": 1.2, "prompt": [1, 2, 3], "top_p": 0.3},
        {"seed": 2**64 - 1},
    )

    def inputs(self) -> list[SamplingInput]:
        return [item(number, **variant) for number, variant in enumerate(self.VARIANTS * 6)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_row_gives_the_same_alone_and_in_any_batch(self, dtype: torch.dtype) -> None:
        inputs = self.inputs()
        logits = (torch.randn(len(inputs), 500) * 3).to(dtype).float()
        together = sample(logits, inputs)
        assert [sample(logits[number : number + 1], [one])[0] for number, one in enumerate(inputs)] == together
        assert sample(logits.flip(0), inputs[::-1]) == together[::-1]
        assert sample(logits[10:20], inputs[10:20]) == together[10:20]

    def test_seed_sequence_and_index_each_matter(self) -> None:
        logits = torch.zeros(1, 1000)
        base = choose(logits, item(3))
        assert choose(logits, item(3)) == base
        assert choose(logits, item(4)) != base
        assert choose(logits, item(3, sequence=1)) != base
        assert choose(logits, item(3, seed=8)) != base

    def test_sequences_of_one_request_differ(self) -> None:
        logits = torch.zeros(1, 1000)
        outputs = {tuple(choose(logits, item(index, sequence=sequence)) for index in range(5)) for sequence in range(8)}
        assert len(outputs) == 8

    def test_uniform_is_uniform_over_each_of_its_arguments(self) -> None:
        for draws in (
            [uniform(number, 0, 0) for number in range(2000)],
            [uniform(0, number, 0) for number in range(2000)],
            [uniform(0, 0, number) for number in range(2000)],
        ):
            assert all(0.0 <= draw < 1.0 for draw in draws)
            counts = Counter(int(draw * 10) for draw in draws)
            # Chi-squared with 9 degrees of freedom exceeds 27.9 once in a thousand.
            assert sum((counts[part] - 200) ** 2 / 200 for part in range(10)) < 27.9


class TestBrokenLogits:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_are_refused_instead_of_giving_any_token(self, value: float, temperature: float) -> None:
        logits = torch.randn(2, VOCAB_SIZE)
        logits[1, 3] = value
        with pytest.raises(InternalError, match="finite"):
            sample(logits, [item(temperature=temperature) for _ in range(2)])
