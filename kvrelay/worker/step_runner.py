"""Runs one step: copies blocks, runs the model, samples, and verifies drafts."""

from collections.abc import Callable, Sequence

from kvrelay.core.finish_rules import ending_token_ids
from kvrelay.core.job import FailureKind, SequenceToken
from kvrelay.core.model_spec import ModelSpec
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.sampler import SamplingInput, sample
from kvrelay.errors import InvalidRequestError
from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.worker.step import Step, StepEntry
from kvrelay.worker.verification import accept_tokens

INTERNAL_MESSAGE = "the worker failed to compute the step; its log has the detail"


def failure_of(error: Exception) -> tuple[FailureKind, str]:
    if isinstance(error, InvalidRequestError):
        # The client must change the request; no other worker should try it.
        return FailureKind.INVALID, error.message
    return FailureKind.INTERNAL, INTERNAL_MESSAGE


class StepRunner:
    """Used by one thread."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._model = runner.model.spec

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        self._runner.cache.copy_blocks(copies)

    def run(self, step: Step, on_layer_written: Callable[[int], None] | None = None) -> list[SequenceToken]:
        """Returns tokens as `accept_tokens` does. The step has at least one entry.

        Calls `on_layer_written` with each layer once the whole step's K and V are in the pool.

        Raises:
            InvalidRequestError: a sequence's grammar allows no token; nothing was computed.
        """
        sampled = [entry for entry in step.entries if entry.continued]
        inputs = [item for entry in sampled for item in _sampling_inputs(entry, self._model)]
        if step.copies:
            self._runner.cache.copy_blocks(step.copies)
        logits = self._runner.run([_sequence_input(entry) for entry in step.entries], on_layer_written)
        if len(inputs) > logits.shape[0]:
            # Sequences that share a prompt sample their first tokens from the same row.
            logits = logits[_rows_by_input(sampled)]
        return accept_tokens(sampled, sample(logits, inputs), self._model)


def _sequence_input(entry: StepEntry) -> SequenceInput:
    sequence = entry.sequence
    assert sequence.block_table is not None, "a scheduled sequence holds blocks"
    begin = sequence.num_computed_tokens
    token_ids = sequence.token_ids[begin : begin + entry.num_tokens]
    if entry.drafts:
        token_ids.extend(entry.drafts)
    return SequenceInput(token_ids, begin, sequence.block_table.blocks, entry.num_logits)


def _rows_by_input(sampled: list[StepEntry]) -> list[int]:
    rows: list[int] = []
    end = 0
    for entry in sampled:
        begin, end = end, end + entry.num_logits
        rows.extend(range(begin, end) if entry.drafts else [begin] * len(entry.continued))
    return rows


def _sampling_inputs(entry: StepEntry, model: ModelSpec) -> list[SamplingInput]:
    """One for each continued sequence; with drafts, one for each row."""
    sequence = entry.sequence
    job = sequence.job
    prompt_token_ids = job.token_ids[: job.num_prompt_tokens]
    ending = ending_token_ids(job.sampling, model) if job.sampling.min_tokens else frozenset()
    index, counts = sequence.next_index, sequence.output_counts
    mask, *masks_of_drafts = _masks(entry, model)
    inputs = [
        SamplingInput(job.sampling, number, index, prompt_token_ids, counts, ending, mask) for number in entry.continued
    ]
    for draft, mask in zip(entry.drafts, masks_of_drafts, strict=True):
        index += 1
        if job.sampling.penalised:
            # Counts earlier drafts as output. If one is wrong, the row is dropped anyway.
            counts = {**counts, draft: counts.get(draft, 0) + 1}
        inputs.append(SamplingInput(job.sampling, entry.continued[0], index, prompt_token_ids, counts, ending, mask))
    return inputs


def _masks(entry: StepEntry, model: ModelSpec) -> list[bytes | None]:
    """One for the last token and one for each draft. None allows all."""
    sequence = entry.sequence
    if sequence.matcher is None:
        return [None] * (1 + len(entry.drafts))
    job = sequence.job
    output = sequence.token_ids[job.num_prompt_tokens :]
    return sequence.matcher.masks(output, entry.drafts, ending_token_ids(job.sampling, model))
