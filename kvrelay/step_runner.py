"""Runs one step: copies blocks, runs the model, samples, keeps or drops drafts. The same code in both workers.

Knows nothing of why a step is made of what it is made of; schedulers do.
"""

from collections.abc import Callable

from kvrelay.engine.model_runner import ModelRunner, StepInput
from kvrelay.engine.sampler import SamplingInput, sample
from kvrelay.finish_rules import ending_token_ids
from kvrelay.model_spec import ModelSpec
from kvrelay.step import Step, StepEntry
from kvrelay.step_output import next_tokens
from kvrelay.work import SequenceToken


class StepRunner:
    """Used by one thread.

    Args:
        runner: the model and its pool.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._model = runner.model.spec

    def run(self, step: Step, on_layer_written: Callable[[int], None] | None = None) -> list[SequenceToken]:
        """Computes the step.

        Args:
            step: at least one entry.
            on_layer_written: called with each layer when K and V of the whole step are in the pool.

        Returns:
            For each entry in order, one token for each of its `continued` sequences, with its finish reason; with drafts, as many
            more as were right.

        Raises:
            InvalidRequestError: a sequence's grammar lets nothing follow; nothing was computed.
        """
        sampled = [entry for entry in step.entries if entry.continued]
        inputs = [item for entry in sampled for item in _sampling_inputs(entry, self._model)]
        if step.copies:
            self._runner.cache.copy_blocks(step.copies)
        logits = self._runner.run([_step_input(entry) for entry in step.entries], on_layer_written)
        if len(inputs) > logits.shape[0]:
            # Sequences that share a prompt draw their first tokens from the same row.
            logits = logits[_rows_by_input(sampled)]
        return next_tokens(sampled, sample(logits, inputs), self._model)


def _step_input(entry: StepEntry) -> StepInput:
    sequence = entry.sequence
    assert sequence.block_table is not None, "a scheduled sequence holds blocks"
    begin = sequence.num_computed_tokens
    token_ids = sequence.token_ids[begin : begin + entry.num_tokens]
    if entry.drafts:
        token_ids.extend(entry.drafts)
    return StepInput(token_ids, begin, sequence.block_table.blocks, entry.num_logits)


def _rows_by_input(sampled: list[StepEntry]) -> list[int]:
    """Row of the logits that each sampling input draws from."""
    rows: list[int] = []
    end = 0
    for entry in sampled:
        begin, end = end, end + entry.num_logits
        rows.extend(range(begin, end) if entry.drafts else [begin] * len(entry.continued))
    return rows


def _sampling_inputs(entry: StepEntry, model: ModelSpec) -> list[SamplingInput]:
    """One for each continued sequence, or one for each row when there are drafts."""
    sequence = entry.sequence
    work = sequence.work
    prompt_token_ids = work.token_ids[: work.num_prompt_tokens]
    ending = ending_token_ids(work.sampling, model) if work.sampling.min_tokens else frozenset()
    index, counts = sequence.next_index, sequence.output_counts
    mask, *masks_of_drafts = _masks(entry, model)
    inputs = [SamplingInput(work.sampling, number, index, prompt_token_ids, counts, ending, mask) for number in entry.continued]
    for draft, mask in zip(entry.drafts, masks_of_drafts, strict=True):
        index += 1
        if work.sampling.penalised:
            # As if the drafts up to here were output: where they are not, the row's token is dropped.
            counts = {**counts, draft: counts.get(draft, 0) + 1}
        inputs.append(SamplingInput(work.sampling, entry.continued[0], index, prompt_token_ids, counts, ending, mask))
    return inputs


def _masks(entry: StepEntry, model: ModelSpec) -> list[bytes | None]:
    """Which tokens each row may choose, that of the last token and that of every draft; None: any."""
    sequence = entry.sequence
    if sequence.matcher is None:
        return [None] * (1 + len(entry.drafts))
    work = sequence.work
    output = sequence.token_ids[work.num_prompt_tokens :]
    return sequence.matcher.masks(output, entry.drafts, ending_token_ids(work.sampling, model))
