"""When a sequence ends by its own tokens."""

import pytest

from kvrelay.core.finish_rules import finish_reason
from kvrelay.core.job import FinishReason
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.sampling_params import SamplingParams

EOS, STOP, OTHER = 2, 9, 5
MODEL = ModelSpec("tiny", "llama", KVLayout(1, 1, 8, "float32"), 16, 20, (EOS,), "f")


@pytest.mark.parametrize(
    ("token_id", "index", "sampling", "expected"),
    [
        (OTHER, 0, SamplingParams(max_tokens=4), None),
        (EOS, 0, SamplingParams(max_tokens=4), FinishReason.STOP),
        (EOS, 0, SamplingParams(max_tokens=4, ignore_eos=True), None),
        (STOP, 1, SamplingParams(max_tokens=4, stop_token_ids=(STOP,)), FinishReason.STOP),
        (STOP, 1, SamplingParams(max_tokens=4, stop_token_ids=(STOP,), ignore_eos=True), FinishReason.STOP),
        (OTHER, 3, SamplingParams(max_tokens=4), FinishReason.LENGTH),
        (EOS, 3, SamplingParams(max_tokens=4), FinishReason.STOP),
        (OTHER, 8, SamplingParams(max_tokens=100), None),
        (OTHER, 9, SamplingParams(max_tokens=100), FinishReason.LENGTH),
    ],
)
def test_the_first_rule_that_holds_gives_the_reason(
    token_id: int, index: int, sampling: SamplingParams, expected: FinishReason | None
) -> None:
    assert finish_reason(token_id, index, 10, sampling, MODEL) is expected
