"""How much of a prompt a step takes, and that no token depends on it."""

import pytest

import decode_worker.main
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from kvrelay.config.decoding_settings import DecodingSettings
from kvrelay.config.settings import DecodeSettings, EngineSettings
from kvrelay.core.prompt_pace import ChunkRange, PromptPace
from kvrelay.worker.engine_setup import WorkerEngine, prompt_chunk
from kvrelay.worker.sequence import PreparedJob
from tests.support.jobs import make_job
from tests.support.worker_fixtures import tiny_engine


@pytest.fixture(scope="module")
def engine() -> WorkerEngine:
    return tiny_engine()


def chunks(engine: WorkerEngine, chunk: int | None, shared_chunk: int | None) -> tuple[ChunkRange, ChunkRange]:
    settings = DecodeSettings(
        engine=EngineSettings(prefill_chunk_tokens=chunk),
        decoding=DecodingSettings(local_prefill_chunk_tokens=shared_chunk),
    )
    full = prompt_chunk(settings.engine, engine)
    return full, decode_worker.main.shared_chunk(settings, engine, full)


def test_flags_win(engine: WorkerEngine) -> None:
    assert chunks(engine, 300, 7) == (ChunkRange.fixed(300), ChunkRange.fixed(7))


def test_the_kernels_have_chunks_that_follow_the_pace(engine: WorkerEngine) -> None:
    assert engine.adapts_chunks
    full, shared = chunks(engine, None, None)
    assert (full.least, full.first, full.most) == (128, 256, 1024)
    assert (shared.least, shared.first, shared.most) == (16, 16, 1024)


def test_without_them_chunks_have_one_size_because_tokens_could_depend_on_it() -> None:
    full, shared = chunks(tiny_engine(kernels="off"), None, None)
    assert (full, shared) == (ChunkRange.fixed(256), ChunkRange.fixed(16))


def test_tokens_do_not_depend_on_the_pace(engine: WorkerEngine) -> None:
    outputs = [output(engine, tokens_per_s) for tokens_per_s in (30.0, 1e5)]
    assert outputs[0][0] != outputs[1][0], "the chunks differ"
    assert outputs[0][1] == outputs[1][1]


def output(engine: WorkerEngine, tokens_per_s: float) -> tuple[list[int], list[int]]:
    """Chunks of a prompt whose steps take as at this rate, and the tokens."""
    pace = PromptPace(ChunkRange(5, 1, 64, step_s=0.1), ChunkRange(3, 1, 64, step_s=0.025))
    scheduler = DecodeScheduler(engine.blocks, DecodeLimits(64, 8, 8), WriteGrants(), pace=pace)
    job = make_job([number % 40 + 5 for number in range(90)], 8, cache_salt=str(tokens_per_s))
    scheduler.reserve(PreparedJob(job))
    assert scheduler.run_prompt(job.job_id)
    chunk_sizes, token_ids = [], []
    while (step := scheduler.schedule()) is not None:
        tokens = engine.step_runner.run(step)
        num_prompt_tokens = sum(entry.num_tokens for entry in step.entries if entry.is_of_prompt)
        scheduler.complete(step, tokens)
        pace.record_step(num_prompt_tokens, 0, max(num_prompt_tokens, 1) / tokens_per_s)
        chunk_sizes.append(num_prompt_tokens)
        token_ids += [token.token.token_id for token in tokens]
    return chunk_sizes, token_ids
