"""Jobs for tests."""

from dataclasses import replace
from typing import Any

from kvrelay.core.job import Job, JobId
from kvrelay.core.sampling_params import SamplingParams


def make_job(token_ids: list[int], max_tokens: int, request_id: str = "a" * 32, attempt: int = 1, **values: Any) -> Job:
    """A greedy job unless `sampling` says otherwise; `values` are fields of Job."""
    job = Job(
        job_id=JobId(request_id, attempt),
        token_ids=tuple(token_ids),
        num_prompt_tokens=len(token_ids),
        num_sequences=1,
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=7),
        cache_salt="",
        deadline_ms=60_000,
    )
    return replace(job, **values)
