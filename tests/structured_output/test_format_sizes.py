"""What a compiled response format takes, as its check measures it."""

import json
from collections.abc import AsyncIterator

import pytest

from kvrelay.core.response_format import ResponseFormat
from kvrelay.structured_output.format_checks import FormatChecks
from kvrelay.structured_output.heap_bytes import heap_bytes
from tests.support import left_out


@pytest.fixture
async def checks() -> AsyncIterator[FormatChecks]:
    made = FormatChecks()
    yield made
    await made.close()


def choice_of(num_values: int) -> ResponseFormat:
    return ResponseFormat.json_schema(json.dumps({"enum": [f"value number {number}" for number in range(num_values)]}))


async def test_a_larger_grammar_has_more_bytes(checks: FormatChecks) -> None:
    small, middle, large = [await checks.check(choice_of(number)) for number in (2, 300, 3000)]
    assert small < middle < large
    assert 256 * 1024 < large < 64 << 20
    assert await checks.check(choice_of(3000)) == large, "kept with the verdict"


@pytest.mark.skipif(heap_bytes() is None, reason=left_out.not_for("systems without glibc"))
def test_the_heap_grows_and_shrinks_with_what_lies_in_it() -> None:
    before = heap_bytes()
    content = bytearray(32 << 20)
    grown = heap_bytes()
    del content
    after = heap_bytes()
    assert before is not None
    assert grown is not None
    assert after is not None
    assert grown - before > 31 << 20
    assert after - before < 1 << 20
