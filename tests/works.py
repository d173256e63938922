"""Works for tests."""

from dataclasses import replace
from typing import Any

from kvrelay.sampling_params import SamplingParams
from kvrelay.work import Work, WorkId


def make_work(token_ids: list[int], max_tokens: int, request_id: str = "a" * 32, attempt: int = 1, **values: Any) -> Work:
    """A greedy work, unless `sampling` says otherwise; `values` are fields of Work."""
    work = Work(
        work_id=WorkId(request_id, attempt),
        token_ids=tuple(token_ids),
        num_prompt_tokens=len(token_ids),
        num_sequences=1,
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=7),
        cache_salt="",
        deadline_ms=60_000,
    )
    return replace(work, **values)
