"""Where a request's time went, in digits and words for people."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from kvrelay.cli.views.phase_table import phase_table
from kvrelay.client.results import Finished, Usage
from kvrelay.core.job import FinishReason
from kvrelay.core.timeline import Phases
from kvrelay.wire.timeline import phases_from_pb, phases_to_pb

PHASES = Phases(prefill_ms=136.257, decode_ms=1240.0, total_ms=12345.6, decode_worker_id="decode-1", num_attempts=1)
USAGE = Usage(num_prompt_tokens=9, num_output_tokens=4, num_cached_tokens=0)


def shown(phases: Phases, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    console.print(phase_table(Finished((FinishReason.STOP,), USAGE, phases)))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_times_have_the_digits_that_a_person_reads() -> None:
    text = shown(PHASES)
    assert all(time in text for time in ("136.3 ms", "1.24 s", "12.3 s"))


def test_a_prompt_that_stayed_on_the_decode_worker_is_explained() -> None:
    stayed = " ".join(shown(replace(PHASES, prefilled_on_decode_worker=True)).split())
    assert "nothing travelled" in stayed
    assert "`kvrelay serve all --local-prefill-tokens 0` sends all to the prefill worker" in stayed
    assert "--local-prefill-tokens" not in shown(replace(PHASES, prefill_worker_id="prefill-1", transfer_bytes=4096))


@pytest.mark.parametrize("time_ms", [136.257, 0.1, 3.0, 86400000.0])
def test_times_that_travelled_have_no_digits_that_were_never_measured(time_ms: float) -> None:
    assert phases_from_pb(phases_to_pb(Phases(total_ms=time_ms))).total_ms == time_ms
