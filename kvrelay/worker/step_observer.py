"""Times a worker's steps and prompts, and reaches the fault points of its steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvrelay.core.chunk_times import ChunkLog, ChunkTime
from kvrelay.core.job import JobId, SequenceToken
from kvrelay.core.prompt_pace import PromptPace
from kvrelay.worker.step import Step


@dataclass(slots=True)
class _Prompt:
    asked_at: float
    """Monotonic seconds, as all times here."""
    began_at: float | None = None
    chunks: ChunkLog = field(default_factory=ChunkLog)


@dataclass(frozen=True, slots=True)
class PromptTime:
    queue_ms: float
    prefill_ms: float
    chunks: tuple[ChunkTime, ...]


class StepObserver:
    """Used by the engine thread. `begins` and `computed` reach fault points."""

    def __init__(
        self,
        pace: PromptPace,
        begins: Callable[[Step], None],
        computed: Callable[[Step, tuple[SequenceToken, ...]], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = pace
        self._step: tuple[float, int, int] = (0.0, 0, 0)
        """Begin, prompt tokens and decoding sequences of the current step."""
        self._begins = begins
        self._computed = computed
        self._now = now
        self._prompts: dict[JobId, _Prompt] = {}
        self._chunks: list[tuple[_Prompt, float, int, int]] = []
        """Prompt, begin, token_begin and token_end of each timed entry in the current step."""

    def on_prompt_asked(self, job_id: JobId, asked_at: float | None = None) -> None:
        self._prompts[job_id] = _Prompt(self._now() if asked_at is None else asked_at)

    def on_prompt_begins(self, job_id: JobId) -> None:
        """Ends the waiting time, as else the first chunk does."""
        self._prompts[job_id].began_at = self._now()

    def on_step_begins(self, step: Step) -> None:
        self._chunks = []
        now = self._now()
        prompts = [entry.num_tokens for entry in step.entries if entry.is_of_prompt]
        self._step = (now, sum(prompts), len(step.entries) - len(prompts))
        if self._prompts:  # rarely on a decode worker
            for entry in step.entries:
                prompt = self._prompts.get(entry.job_id)
                if prompt is not None:
                    prompt.began_at = now if prompt.began_at is None else prompt.began_at
                    self._chunks.append((prompt, now, entry.token_begin, entry.token_end))
        self._begins(step)

    def on_step_computed(self, step: Step, tokens: tuple[SequenceToken, ...]) -> None:
        step_began_at, num_prompt_tokens, num_decoding = self._step
        self._pace.record_step(num_prompt_tokens, num_decoding, self._now() - step_began_at)
        for prompt, began_at, token_begin, token_end in self._chunks:
            origin = began_at if prompt.began_at is None else prompt.began_at
            begin_ms, end_ms = (began_at - origin) * 1000, (self._now() - origin) * 1000
            prompt.chunks.add(ChunkTime(begin_ms, end_ms, token_begin, token_end))
        self._computed(step, tokens)

    def finish_prompt(self, job_id: JobId) -> PromptTime | None:
        """None if the prompt was not timed."""
        prompt = self._prompts.pop(job_id, None)
        if prompt is None or prompt.began_at is None:
            return None
        queue_ms, prefill_ms = (prompt.began_at - prompt.asked_at) * 1000, (self._now() - prompt.began_at) * 1000
        return PromptTime(queue_ms, prefill_ms, prompt.chunks.times)

    def discard_prompt(self, job_id: JobId) -> None:
        self._prompts.pop(job_id, None)
