"""What is computed from a run's responses: rates, times to first token, times between tokens. Pure."""

import itertools
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.peers.adapters.adapter_loop import Response
from benchmarks.peers.workloads import Run
from benchmarks.statistics import percentile

TOKENS_PER_S = "tokens_per_s"
TTFT_S = "ttft_s"
ITL_P50_MS = "itl_p50_ms"
ITL_P99_MS = "itl_p99_ms"
ITL_MAX_MS = "itl_max_ms"
LONG_TTFT_S = "long_ttft_s"

HIGHER_IS_BETTER = frozenset({TOKENS_PER_S})

Measures = Mapping[str, float]


class IncompleteRunError(RuntimeError):
    """An engine did not generate what it was asked for."""


def measure(run: Run, responses: Sequence[Response]) -> Measures:
    """The measures of a run, by their names.

    w1: tokens per second between the first and the last token, and TTFT. w2: all tokens over the
    time from the first submission to the last token, and the mean TTFT. w3: times between the
    tokens of the streams, all streams together, and the mean TTFT of the long prompts.

    Raises:
        IncompleteRunError: a request has no response, or another number of tokens than asked for.
    """
    by_id = {response.request_id: response for response in responses}
    _check_complete(run, by_id)
    foreground = [by_id[request.request_id] for request in run.requests if not request.background]
    if run.name == "w1":
        (response,) = foreground
        return {TOKENS_PER_S: _decode_rate(response), TTFT_S: _ttft_s(response)}
    if run.workload == "ttft":
        return {TTFT_S: _ttft_s(foreground[0])}
    if run.name == "w2":
        num_tokens = sum(len(response.token_times_s) for response in foreground)
        begin_s = min(response.submitted_s for response in foreground)
        end_s = max(response.token_times_s[-1] for response in foreground)
        return {TOKENS_PER_S: num_tokens / (end_s - begin_s), TTFT_S: statistics.fmean(map(_ttft_s, foreground))}
    long_prompts = [
        by_id[request.request_id] for request in run.requests if request.background and request.request_id in by_id
    ]
    return _stream_measures(foreground, long_prompts)


def _stream_measures(streams: Sequence[Response], long_prompts: Sequence[Response]) -> Measures:
    gaps_ms = [
        1000 * (later - earlier) for each in streams for earlier, later in itertools.pairwise(each.token_times_s)
    ]
    measures = {ITL_P50_MS: percentile(gaps_ms, 50), ITL_P99_MS: percentile(gaps_ms, 99), ITL_MAX_MS: max(gaps_ms)}
    if long_prompts:
        measures[LONG_TTFT_S] = statistics.fmean(map(_ttft_s, long_prompts))
    return measures


def _check_complete(run: Run, by_id: Mapping[int, Response]) -> None:
    for request in run.requests:
        response = by_id.get(request.request_id)
        if response is None and request.background:
            continue
        num_tokens = 0 if response is None else len(response.token_times_s)
        if num_tokens != request.max_tokens:
            raise IncompleteRunError(f"{run.name}: {num_tokens} tokens instead of {request.max_tokens}")


def _decode_rate(response: Response) -> float:
    return (len(response.token_times_s) - 1) / (response.token_times_s[-1] - response.token_times_s[0])


def _ttft_s(response: Response) -> float:
    return response.token_times_s[0] - response.submitted_s
