"""Perplexity of scores, windows of a text, and the text itself."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.engine_steps import load_engine
from benchmarks.installed_text import installed_text
from benchmarks.perplexity import Score, compare, perplexity, score_window, split
from tests.support.reference import Reference
from tests.support.tiny_models import make_tiny_model


def test_perplexity_is_the_number_of_equally_likely_choices() -> None:
    assert perplexity([Score(math.log(8), 0)] * 5) == pytest.approx(8)
    assert perplexity([Score(math.log(4), 0), Score(math.log(16), 0)]) == pytest.approx(8)


def test_a_text_is_split_into_windows_that_have_something_to_foresee() -> None:
    assert split(range(10), 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert split(range(9), 4) == [range(0, 4), range(4, 8)]


def test_choices_of_types_are_compared_token_by_token() -> None:
    first = [[Score(1.0, 5), Score(1.0, 6)], [Score(1.0, 7)]]
    second = [[Score(1.0, 5), Score(1.0, 0)], [Score(1.0 + math.log(2), 7)]]
    result = compare("int8", "float32", second, first)
    assert result.ratio == pytest.approx(2 ** (1 / 3))
    assert result.window_ratios == pytest.approx((1.0, 2.0))
    assert result.percent_same_choice == pytest.approx(200 / 3)


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path)
    num_threads = torch.get_num_threads()
    ours = load_engine(str(folder), 1, 512)
    torch.set_num_threads(num_threads)
    token_ids = [(7 * number + 3) % 320 for number in range(300)]  # more than one chunk
    scores = score_window(ours, token_ids)
    with torch.inference_mode():
        logits = Reference(folder)._model(input_ids=torch.tensor([token_ids])).logits[0, :-1].double()
    expected = -logits.log_softmax(dim=-1).gather(1, torch.tensor(token_ids[1:]).unsqueeze(1)).squeeze(1)
    assert [score.negative_log_probability for score in scores] == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_text_is_the_same_every_time_and_has_licences_and_sources() -> None:
    text = installed_text(15_000)
    assert text == installed_text(15_000)
    assert len(text) == 15_000
    assert "MIT License" in text
    assert "import " in text
