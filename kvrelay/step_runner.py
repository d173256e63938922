"""Runs one step: copies blocks, runs the model, samples, and applies the finish rules. The same code in both workers.

Knows nothing of why a step is made of what it is made of; schedulers do.
"""

from collections.abc import Callable, Sequence

from kvrelay.engine.model_runner import ModelRunner, StepInput
from kvrelay.engine.sampler import SamplingInput, sample
from kvrelay.finish_rules import ending_token_ids, finish_reason
from kvrelay.model_spec import ModelSpec
from kvrelay.step import Step, StepEntry
from kvrelay.work import SequenceToken, Token


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
            For each entry in order, one token for each of its `continued` sequences, with its finish reason.
        """
        if step.copies:
            self._runner.cache.copy_blocks(step.copies)
        logits = self._runner.run([_step_input(entry) for entry in step.entries], on_layer_written)
        sampled = [entry for entry in step.entries if entry.continued]
        inputs = [_sampling_input(entry, number, self._model) for entry in sampled for number in entry.continued]
        if len(inputs) > len(sampled):
            # Sequences that share a prompt draw their first tokens from the same row.
            logits = logits[[row for row, entry in enumerate(sampled) for _ in entry.continued]]
        return finish_tokens(sampled, sample(logits, inputs), self._model)


def finish_tokens(sampled: Sequence[StepEntry], tokens: Sequence[Token], model: ModelSpec) -> list[SequenceToken]:
    """Applies the finish rules: the one place where both workers do.

    Args:
        sampled: entries of a step that sample.
        tokens: one for each of their continued sequences, in order.
        model: the served model.
    """
    owners = [(entry.sequence, number) for entry in sampled for number in entry.continued]
    return [
        SequenceToken(
            sequence.work.work_id,
            number,
            sequence.next_index,
            token,
            finish_reason(token.token_id, sequence.next_index, sequence.work.num_prompt_tokens, sequence.work.sampling, model),
        )
        for (sequence, number), token in zip(owners, tokens, strict=True)
    ]


def _step_input(entry: StepEntry) -> StepInput:
    sequence = entry.sequence
    assert sequence.block_table is not None, "a scheduled sequence holds blocks"
    return StepInput(
        token_ids=sequence.token_ids[entry.token_begin : entry.token_end],
        position=entry.token_begin,
        block_ids=sequence.block_table.blocks,
        num_logits=1 if entry.continued else 0,
    )


def _sampling_input(entry: StepEntry, number: int, model: ModelSpec) -> SamplingInput:
    work = entry.sequence.work
    return SamplingInput(
        sampling=work.sampling,
        sequence=number,
        index=entry.sequence.next_index,
        prompt_token_ids=work.token_ids[: work.num_prompt_tokens],
        output_counts=entry.sequence.output_counts,
        ending_token_ids=ending_token_ids(work.sampling, model),
    )
