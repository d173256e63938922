"""A request's timeline as a waterfall of characters, for rich.

attempt 1  prefill-12ab → decode-34cd
    queue  ▒▒
  prefill    ████▌██████
       KV      ▓▓▓ ▓▓▓▓▓
   tokens               ╷╷╷╷╷╷╷╷  ✕ decode-34cd was lost
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from kvrelay.cli.views.readable_time import milliseconds
from kvrelay.client.results import RequestInfo, RequestTimeline
from kvrelay.core.timeline import JobOutcome, JobTimeline, SpanKind, Timeline, TokenRun

LABEL_WIDTH = 12
MIN_WIDTH = 40
NUM_ID_CHARACTERS = 15
_QUEUE_KINDS = (SpanKind.ROUTE, SpanKind.RESERVE, SpanKind.PROMPT_QUEUE)
_QUEUE_STYLES = {SpanKind.ROUTE: "bright_black", SpanKind.RESERVE: "white", SpanKind.PROMPT_QUEUE: "yellow"}
_ATTEMPT_STYLES = ("green", "magenta", "blue", "yellow")


class Waterfall:
    def __init__(self, answer: RequestTimeline) -> None:
        self._request = answer.request
        self._timeline = answer.timeline

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width - LABEL_WIDTH, MIN_WIDTH)
        scale = Scale(max(self._timeline.duration_ms, 0.001), width)
        rows: list[RenderableType] = [_headline(self._request, self._timeline), Text(), scale.axis()]
        for job in self._timeline.jobs:
            rows += _job_rows(job, scale)
        rows += [_index_row(self._timeline, sequence, width) for sequence in self._timeline.sequences]
        rows += _remarks(self._timeline)
        yield Group(*rows)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps milliseconds to columns."""

    duration_ms: float
    width: int

    def column(self, time_ms: float) -> int:
        return min(max(int(time_ms / self.duration_ms * self.width), 0), self.width - 1)

    def axis(self) -> Text:
        row = Row(self.width)
        for quarter in range(4):
            row.write(quarter * self.width // 4, f"╷{milliseconds(quarter * self.duration_ms / 4)}", "bright_black")
        return row.labelled("")


class Row:
    """One line of styled characters. Later ones overwrite earlier ones."""

    def __init__(self, width: int) -> None:
        self._cells: list[tuple[str, str]] = [(" ", "")] * width

    def write(self, column: int, text: str, style: str) -> None:
        """Crops what does not fit."""
        for offset, character in enumerate(text[: len(self._cells) - column]):
            self._cells[column + offset] = (character, style)

    def fill(self, scale: Scale, begin_ms: float, end_ms: float, character: str, style: str) -> None:
        """Draws a span, at least one column wide."""
        begin, end = scale.column(begin_ms), scale.column(end_ms)
        self.write(begin, character * max(end - begin, 1), style)

    def labelled(self, label: str) -> Text:
        line = Text(f"{label:>{LABEL_WIDTH - 2}}  ", style="bright_black", no_wrap=True, overflow="crop")
        for character, style in self._cells:
            line.append(character, style)
        return line


def _headline(request: RequestInfo, timeline: Timeline) -> Text:
    line = Text(request.request_id, style="bold")
    line.append(f"  {request.state.value}", "green" if request.state.value == "succeeded" else "yellow")
    tokens = f"{request.num_prompt_tokens} prompt tokens, {request.num_output_tokens} generated"
    line.append(f"  {request.model}, {tokens}, {milliseconds(timeline.duration_ms)}", "not bold")
    if request.error_message:
        line.append(f"\n{request.error_message}", "red")
    return line


def _job_rows(job: JobTimeline, scale: Scale) -> Iterable[Text]:
    yield _job_title(job)
    queue = Row(scale.width)
    for kind in _QUEUE_KINDS:
        if span := job.span(kind):
            queue.fill(scale, span.begin_ms, span.end_ms, "▒", _QUEUE_STYLES[kind])
    yield queue.labelled("queue")
    if span := job.span(SpanKind.PREFILL):
        prefill = Row(scale.width)
        prefill.fill(scale, span.begin_ms, span.end_ms, "░" if span.unreported else "▒", "blue")
        for chunk in job.prompt_chunks:
            prefill.fill(scale, chunk.begin_ms, chunk.end_ms, "█", "blue")
            prefill.write(scale.column(chunk.begin_ms), "▐", "blue")
        yield prefill.labelled("prefill")
    if span := job.span(SpanKind.TRANSFER):
        transfer = Row(scale.width)
        transfer.fill(scale, span.begin_ms, span.end_ms, "░", "magenta")
        for chunk in job.kv_chunks:
            transfer.fill(scale, chunk.begin_ms, chunk.end_ms, "▓", "magenta")
        yield transfer.labelled("KV")
    yield _token_row(job, scale)


def _job_title(job: JobTimeline) -> Text:
    decode = short_id(job.decode_worker_id) or "no worker yet"
    way = decode if not job.prefill_worker_id else f"{short_id(job.prefill_worker_id)} → {decode}"
    title = Text(f"attempt {job.attempt}", style="bold", overflow="fold")
    if job.num_sequences == 1 and job.first_sequence:
        title.append(f", sequence {job.first_sequence}")
    title.append(f"  {way}", "not bold")
    if job.kv_bytes:
        rate = f" at {job.kv_bytes / job.transfer_wire_ms / 1e6:.2f} GB/s" if job.transfer_wire_ms else ""
        title.append(f"  {job.kv_bytes / 1e6:.1f} MB of KV{rate}", "not bold magenta")
    if job.end_reason:
        title.append(f"  ✕ {job.end_reason}", "not bold red")
    return title


def _token_row(job: JobTimeline, scale: Scale) -> Text:
    row = Row(scale.width)
    if span := job.span(SpanKind.DECODE):
        row.fill(scale, span.begin_ms, span.end_ms, "·", "green")
    for run in job.token_runs:
        for mark in run.mark_ms:
            row.write(scale.column(mark), "╷", "green")
    if job.outcome is JobOutcome.RETRIED or job.failed_worker_id:
        row.write(scale.column(job.end_ms), "✕", "bold red")
    return row.labelled("tokens")


def _index_row(timeline: Timeline, sequence: int, width: int) -> Text:
    """Shows the attempt that each token index came from."""
    runs = timeline.token_runs(sequence)
    total = max(run.end_index for run in runs)
    row = Row(width)
    for attempt, run in _with_attempts(timeline, runs):
        begin, end = run.first_index * width // total, run.end_index * width // total
        style = f"white on {_ATTEMPT_STYLES[(attempt - 1) % len(_ATTEMPT_STYLES)]}"
        row.write(begin, _run_label(run, attempt, end - begin).center(end - begin), style)
    return row.labelled("indices" if len(timeline.sequences) == 1 else f"sequence {sequence}")


def _run_label(run: TokenRun, attempt: int, width: int) -> str:
    """The longest name of the run that fits."""
    indices = f"{run.first_index}-{run.end_index - 1}"
    names = (f"{indices}, attempt {attempt}", indices, f"{run.first_index}", "")
    return next(name for name in names if len(name) <= width)


def _with_attempts(timeline: Timeline, runs: list[TokenRun]) -> Iterable[tuple[int, TokenRun]]:
    for run in runs:
        yield next((job.attempt, run) for job in timeline.jobs if run in job.token_runs)


def _remarks(timeline: Timeline) -> Iterable[Text]:
    if timeline.num_tokens_before:
        before = ", ".join(map(str, timeline.num_tokens_before))
        yield Text(f"taken over from another gateway after {before} tokens, whose times are not known", style="yellow")
    if timeline.num_forgotten_jobs:
        yield Text(
            f"{timeline.num_forgotten_jobs} attempts between the first and those shown are forgotten", style="yellow"
        )
    for sequence in timeline.sequences:
        if not timeline.is_contiguous(sequence):
            yield Text(f"sequence {sequence}: the token indices are not contiguous", style="bold red")
        for begin, end in timeline.pauses(sequence):
            yield Text(
                f"paused for {milliseconds(end - begin)} at {milliseconds(begin)}, and went on with the next token",
                "red",
            )


def short_id(identifier: str) -> str:
    return identifier[:NUM_ID_CHARACTERS]
