"""Computes slow grammar masks outside the engine thread, while other sequences continue.

    scheduled step --fit--> step without sequences that lack a mask --> run
                     |
                     '--> mask threads --wake--> collect: the sequence is scheduled again

Output does not change, because a token does not depend on its step.
"""

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvrelay.core.finish_rules import ending_token_ids
from kvrelay.core.job import JobId
from kvrelay.core.model_spec import ModelSpec
from kvrelay.structured_output.grammar import GrammarMatcher
from kvrelay.worker.sequence import TokenSequence
from kvrelay.worker.step import Step, StepEntry

NUM_THREADS = 2
MAX_STEP_S = 0.02
"""In the engine thread, per step; the last mask may exceed it."""
NICENESS = 10
"""Of mask threads on Linux: only their own sequences wait for them."""


@dataclass(frozen=True, slots=True)
class GrammarFailure:
    """`error`: InvalidRequestError, or a defect of kvrelay."""

    job_id: JobId
    error: Exception


class MaskDesk:
    """Used by the engine thread. `wake` is called in mask threads."""

    def __init__(self, model: ModelSpec, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._model = model
        self._asked: queue.SimpleQueue[TokenSequence] = queue.SimpleQueue()
        self._made: deque[tuple[TokenSequence, Exception | None]] = deque()
        self._cores = os.sched_getaffinity(0) if sys.platform == "linux" else None
        self._num_threads = 0

    def collect(self) -> list[GrammarFailure]:
        failures = []
        while self._made:
            sequence, error = self._made.popleft()
            sequence.awaits_mask = False
            if error is not None:
                failures.append(GrammarFailure(sequence.job.job_id, error))
        return failures

    def fit(self, step: Step) -> tuple[Step, list[GrammarFailure]]:
        """Leaves out sequences that lack a mask, and failed jobs. Keeps all copies."""
        kept: list[StepEntry] = []
        failures: list[GrammarFailure] = []
        spent_s = 0.0
        for entry in step.entries:
            matcher = entry.sequence.matcher
            if matcher is None or not entry.continued:
                kept.append(entry)
                continue
            entry = replace(entry, drafts=()) if matcher.is_slow and entry.drafts else entry
            if (matcher.is_slow or spent_s > MAX_STEP_S) and not self._has_masks(entry, matcher):
                self._ask(entry.sequence)
                continue
            began_at = time.thread_time()
            try:
                self._make(entry.sequence, matcher, entry.drafts)
            except Exception as error:  # fails this job only
                failures.append(GrammarFailure(entry.job_id, error))
            else:
                kept.append(entry)
            spent_s += time.thread_time() - began_at
        failed = {failure.job_id for failure in failures}
        return Step(tuple(entry for entry in kept if entry.job_id not in failed), step.copies), failures

    def _has_masks(self, entry: StepEntry, matcher: GrammarMatcher) -> bool:
        sequence = entry.sequence
        return matcher.has_masks(
            sequence.next_index, entry.drafts, ending_token_ids(sequence.job.sampling, self._model)
        )

    def _make(self, sequence: TokenSequence, matcher: GrammarMatcher, drafts: tuple[int, ...] = ()) -> None:
        job = sequence.job
        matcher.masks(sequence.token_ids[job.num_prompt_tokens :], drafts, ending_token_ids(job.sampling, self._model))

    def _ask(self, sequence: TokenSequence) -> None:
        sequence.awaits_mask = True
        self._asked.put(sequence)
        if self._num_threads < NUM_THREADS:
            self._num_threads += 1
            threading.Thread(target=self._serve, name="masks", daemon=True).start()

    def _serve(self) -> None:
        if self._cores is not None:  # otherwise inherited: the engine thread's own core
            os.sched_setaffinity(0, self._cores)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            sequence = self._asked.get()
            assert sequence.matcher is not None, "only those with a response format are asked for"
            error: Exception | None = None
            try:
                self._make(sequence, sequence.matcher)
            except Exception as failure:  # the engine thread handles it
                error = failure
            self._made.append((sequence, error))
            del sequence, error  # otherwise held until the next sequence comes
            self._wake()
