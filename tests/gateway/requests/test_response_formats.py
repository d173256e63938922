"""A format that must be compiled is counted for its key first, and checked before anything else."""

from typing import Any

import pytest

from gateway.requests.response_formats import ResponseFormats
from gateway.telemetry.metrics import GatewayMetrics
from gateway.workers.served_models import ModelLimits
from kvrelay.core.limit_names import LimitName
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.response_format import ResponseFormat
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import PreconditionError, QuotaError

LAYOUT = KVLayout(2, 2, 16, "float32")
LIMITS = ModelLimits(ModelSpec("tiny", "llama", LAYOUT, 320, 512, (0,), "f1"), 400)


class Checks:
    def __init__(self) -> None:
        self.checked: list[ResponseFormat] = []

    def __contains__(self, response_format: ResponseFormat) -> bool:
        return response_format in self.checked

    async def check(self, response_format: ResponseFormat) -> None:
        self.checked.append(response_format)


class Keys:
    """A key that may have `left` formats compiled."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self) -> None:
        if not self.left:
            raise QuotaError("key has had its formats", 1000, LimitName.FORMATS)
        self.left -= 1


def asking(regex: str) -> SamplingParams:
    return SamplingParams(response_format=ResponseFormat.regex(regex))


async def test_a_key_pays_for_formats_that_are_new_and_none_is_checked_without() -> None:
    checks, keys, metrics = Checks(), Keys(1), GatewayMetrics()
    stand_in: Any = checks
    formats = ResponseFormats(stand_in, metrics, keys.take)
    await formats.check(SamplingParams(), LIMITS)
    await formats.check(asking("a"), LIMITS)
    await formats.check(asking("a"), LIMITS)  # known: costs nothing
    with pytest.raises(QuotaError):
        await formats.check(asking("b"), LIMITS)
    assert [each.source for each in checks.checked] == ["a", "a"]
    assert metrics.refusals["QUOTA_EXCEEDED"] == 1


async def test_a_model_that_cannot_end_takes_no_format() -> None:
    checks: Any = Checks()
    endless = ModelLimits(ModelSpec("tiny", "llama", LAYOUT, 320, 512, (), "f1"), 400)
    with pytest.raises(PreconditionError):
        await ResponseFormats(checks, GatewayMetrics()).check(asking("a"), endless)
    assert checks.checked == []
