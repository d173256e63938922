"""Our engine as a worker runs it, without a scheduler: whoever measures decides what each step
computes.

Steps go through the worker's own StepRunner, so that a step here costs what it costs there: block
bookkeeping, model, sampler and finish rules. Knows nothing of time.
"""

from collections.abc import Sequence

from pydantic import ValidationError

from kvrelay.config.settings import EngineSettings
from kvrelay.core.job import Job, JobId
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import ConfigError
from kvrelay.observability.logging import configure_logging
from kvrelay.runtime.cpu_cores import processor_share
from kvrelay.worker.engine_setup import WorkerEngine, build_engine
from kvrelay.worker.sequence import PreparedJob, TokenSequence
from kvrelay.worker.step import Step, StepEntry

NO_LIMIT_TOKENS = 2**31
GREEDY = SamplingParams(temperature=0.0, max_tokens=NO_LIMIT_TOKENS, ignore_eos=True)


class EngineSteps:
    """An engine and the sequences that are started on it.

    Args:
        engine: with its prefix cache off, so that every prompt is computed.
    """

    def __init__(self, engine: WorkerEngine) -> None:
        self.engine = engine
        self._num_started = 0

    def start(self, token_ids: Sequence[int]) -> TokenSequence:
        """A greedy sequence that holds blocks for all its tokens, none of them computed.

        Raises:
            OutOfBlocksError: the pool has no room for it.
        """
        self._num_started += 1
        job_id = JobId(f"benchmark-{self._num_started}", attempt=1)
        job = Job(job_id, tuple(token_ids), len(token_ids), 1, GREEDY, cache_salt="", deadline_ms=0)
        sequence = TokenSequence(PreparedJob(job), (0,))
        sequence.block_table = self.engine.blocks.allocate(sequence.token_ids, "")
        return sequence

    def step(self, parts: Sequence[tuple[TokenSequence, int]]) -> None:
        """Computes the next so many tokens of each sequence; one whose tokens are all computed then
        gets its next token.
        """
        entries, copies = [], []
        for sequence, num_tokens in parts:
            assert sequence.block_table is not None, "the sequence was released"
            end = sequence.num_computed_tokens + num_tokens
            copies += self.engine.blocks.grow(sequence.block_table, end)
            entries.append(StepEntry(sequence, num_tokens, continued=(0,) if end == sequence.num_tokens else ()))
        sampled = self.engine.step_runner.run(Step(tuple(entries), tuple(copies)))
        for sequence, num_tokens in parts:
            sequence.num_computed_tokens += num_tokens
        for entry, token in zip([entry for entry in entries if entry.continued], sampled, strict=True):
            entry.sequence.append(token.token.token_id)

    def prefill(self, sequence: TokenSequence, chunk_tokens: int) -> None:
        """Computes all of a sequence's tokens in chunks, and its next token."""
        while sequence.num_uncomputed_tokens > chunk_tokens:
            self.step([(sequence, chunk_tokens)])
        self.step([(sequence, sequence.num_uncomputed_tokens)])

    def release(self, sequence: TokenSequence) -> None:
        """Gives the sequence's blocks back."""
        assert sequence.block_table is not None, "the sequence was released"
        self.engine.blocks.release(sequence.block_table)
        sequence.block_table = None


def load_engine(model: str, num_threads: int, num_pool_tokens: int, **settings: str | int | None) -> EngineSteps:
    """The engine of a worker with these settings, all others being the defaults.

    Args:
        model: as in the setting.
        num_threads: CPU threads.
        num_pool_tokens: tokens that the pool must hold.
        settings: further ones of EngineSettings; None for the default.

    Raises:
        ModelLoadError: the model is missing, broken or unsupported.
        ConfigError: a setting is wrong.
    """
    configure_logging("warning", "console")
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        engine_settings = EngineSettings.model_validate(
            {"model": model, "num_threads": num_threads, "prefix_cache": False} | given
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name} is {first['input']!r}: {first['msg']}") from error
    num_blocks = -(-num_pool_tokens // engine_settings.block_size) + 1
    return EngineSteps(build_engine(engine_settings.model_copy(update={"num_kv_blocks": max(2, num_blocks)})))


def usable_cores() -> int:
    """Cores that this process may keep busy."""
    return processor_share().num_threads
