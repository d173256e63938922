"""`kvrelay bench speculation`: decoding with and without guesses by prompt lookup, of texts that
repeat and of one that does not.

The scheduler, the step runner and the model are a decode worker's own; no session and no wire. Runs
of both kinds alternate.
"""

import inspect
import time
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.engine_steps import load_engine, usable_cores
from benchmarks.report import Json, Plots, Report
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.drafting import DraftLength
from decode_worker.scheduling.events import BlocksReserved
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from decode_worker.scheduling.speculation import SpeculationLimits
from kvrelay.core.job import Job, JobId
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import ConfigError
from kvrelay.models.store import DEMO_MODEL
from kvrelay.worker.engine_setup import WorkerEngine
from kvrelay.worker.sequence import PreparedJob

PARAGRAPH = (
    "The keeper of the northern lighthouse rose before the sun, trimmed the lamp, and wrote the weather into a "
    "book bound in"
    " green cloth. On the third of March the wind came from the east, and with it a ship without a name. She "
    "carried salt, copper"
    " and eleven letters, none of which were addressed to anybody on the island. The keeper took them in, dried "
    "them by the"
    " stove, and put them on the shelf beside the clock."
)
BATCHES = [1, 4]
PROMPTS = {
    "copy": f"Repeat the following text word for word, twice:\n\n{PARAGRAPH}",
    "code": "Repeat this Python class exactly, but rename it to GuessLength:\n\n" + inspect.getsource(DraftLength),
    "story": "Write a long story about a lighthouse keeper who finds letters without an address.",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One text, decoded by `batch` sequences at once."""

    text: str
    batch: int
    temperature: float
    speculative_tokens: int
    tokens_per_s: float
    """Of all sequences together, behind their first tokens."""
    tokens_per_step: float
    """Of one sequence."""
    num_drafted: int
    num_accepted: int
    token_ids: tuple[tuple[int, ...], ...]


def command(
    model: Annotated[str, typer.Option("--model", help="Model, as in the setting.")] = DEMO_MODEL,
    quantize: Annotated[str | None, typer.Option("--quantize", help="As in the setting.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each sequence.")] = 200,
    batches: Annotated[
        list[int], typer.Option("--batch", min=1, help="Sequences at once; may be given often.")
    ] = BATCHES,
    drafts: Annotated[int, typer.Option("--drafts", min=1, help="Most guesses per sequence and step.")] = 8,
    max_rows: Annotated[int, typer.Option("--max-rows", min=2, help="As --speculative-max-rows.")] = 16,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Runs of each kind; the median counts.")] = 3,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")] = None,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Decoding with and without speculation: tokens per second and per step, and how many guesses
    were right.
    """
    report = Report("speculation", json, plots)
    engine = load_engine(model, threads or usable_cores(), 2048 * max(batches), quantize=quantize).engine
    rows = []
    for text in PROMPTS:
        for batch in batches:
            for temperature in (0.0, 0.7) if batch == min(batches) else (0.0,):
                report.progress(f"{text}, {batch} at once, temperature {temperature}")
                kinds = [0, drafts]
                runs = [
                    [_run(engine, text, batch, temperature, kind, max_rows, tokens) for kind in kinds]
                    for _ in range(repetitions)
                ]
                plain, guessing = ([pair[place] for pair in runs] for place in (0, 1))
                same = all(one.token_ids == plain[0].token_ids for one in (*plain, *guessing))
                report.add(*plain, *guessing)
                rows.append(_row(plain, guessing, same))
    report.print_table(
        "Speculation by prompt lookup",
        ("text", "batch", "temp.", "tok/s off", "tok/s on", "ratio", "tok/step", "guessed", "right %", "same tokens"),
        rows,
    )
    report.finish()


def _row(plain: list[Run], guessing: list[Run], same: bool) -> list[object]:
    off, on = (median([run.tokens_per_s for run in runs]) for runs in (plain, guessing))
    run = guessing[0]
    share = 100 * run.num_accepted / max(1, run.num_drafted)
    head = [run.text, run.batch, run.temperature, off, on, f"{on / off:.2f}", f"{run.tokens_per_step:.2f}"]
    return [*head, run.num_drafted, share, "yes" if same else "no"]


def _run(
    engine: WorkerEngine, text: str, batch: int, temperature: float, drafts: int, max_rows: int, num_tokens: int
) -> Run:
    speculation = SpeculationLimits(drafts, max_rows, engine.max_sequence_tokens) if drafts else None
    scheduler = DecodeScheduler(engine.blocks, DecodeLimits(256, batch, batch), WriteGrants(), speculation)
    prompt = _encode(engine, PROMPTS[text])
    for number in range(batch):
        sampling = SamplingParams(temperature=temperature, seed=number, max_tokens=num_tokens, ignore_eos=True)
        job_id = JobId(f"benchmark-{number}", 1)
        scheduler.reserve(PreparedJob(Job(job_id, prompt, len(prompt), 1, sampling, cache_salt="", deadline_ms=0)))
        scheduler.run_prompt(job_id)
    assert sum(isinstance(event, BlocksReserved) for event in scheduler.drain_events()) == batch, (
        "the pool holds all of them"
    )
    output: dict[str, list[int]] = {}
    started_at, num_before, num_steps = 0.0, 0, 0
    while (step := scheduler.schedule()) is not None:
        tokens = engine.step_runner.run(step)
        scheduler.complete(step, tokens)
        for token in tokens:
            output.setdefault(token.job_id.request_id, []).append(token.token.token_id)
        if started_at:
            num_steps += sum(1 for entry in step.entries if entry.continued)
        elif len(output) == batch:
            started_at, num_before = time.perf_counter(), sum(map(len, output.values()))
    num_decoded = batch * num_tokens - num_before
    load = scheduler.load()
    return Run(
        text,
        batch,
        temperature,
        drafts,
        num_decoded / (time.perf_counter() - started_at),
        num_decoded / num_steps,
        load.num_drafted_tokens,
        load.num_accepted_tokens,
        tuple(tuple(ids) for ids in output.values()),
    )


def _encode(engine: WorkerEngine, text: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(engine.folder)
        messages = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tuple(tokenizer(encoded, add_special_tokens=False).input_ids)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{engine.model.name} has no tokenizer with a chat template: {error}") from error
