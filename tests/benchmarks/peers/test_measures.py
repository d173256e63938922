"""What is computed from the times of a run, from spreads and from pairs of results."""

import dataclasses

import pytest

from benchmarks.peers.adapters.adapter_loop import Request, Response
from benchmarks.peers.measures import IncompleteRunError, measure
from benchmarks.peers.results import advantage, find, make_results
from benchmarks.peers.workloads import Run, runs_of


def response(request_id: int, submitted_s: float, *times_s: float) -> Response:
    return Response(request_id, submitted_s, list(times_s), [0] * len(times_s))


def run(name: str, *requests: Request) -> Run:
    return Run(name.partition("-")[0], name, requests)


def test_one_stream_counts_the_tokens_after_the_first() -> None:
    measures = measure(run("w1", Request(0, [1], 3)), [response(0, 10.0, 12.0, 12.5, 13.0)])
    assert measures == {"tokens_per_s": 2.0, "ttft_s": 2.0}


def test_a_batch_counts_all_tokens_from_the_first_submission_to_the_last_token() -> None:
    requests = (Request(0, [1], 2), Request(1, [1], 2))
    measures = measure(run("w2", *requests), [response(0, 10.0, 11.0, 12.0), response(1, 10.0, 13.0, 14.0)])
    assert measures == {"tokens_per_s": 1.0, "ttft_s": 2.0}


def test_streams_and_long_prompts_are_measured_apart() -> None:
    requests = (Request(0, [1], 3), Request(1, [1], 1, 5.0, background=True), Request(2, [1], 1, 9.0, background=True))
    measures = measure(run("w3", *requests), [response(0, 0.0, 1.0, 1.1, 1.4), response(1, 5.0, 8.0)])
    assert measures["itl_p50_ms"] == pytest.approx(200)
    assert measures["itl_max_ms"] == pytest.approx(300)
    assert measures["long_ttft_s"] == pytest.approx(3)


def test_a_missing_or_short_response_fails_the_run() -> None:
    with pytest.raises(IncompleteRunError, match="1 tokens instead of 3"):
        measure(run("w1", Request(0, [1], 3)), [response(0, 0.0, 1.0)])
    with pytest.raises(IncompleteRunError, match="0 tokens instead of 3"):
        measure(run("w1", Request(0, [1], 3)), [])


def test_an_advantage_is_taken_round_by_round_and_above_one_when_we_are_ahead() -> None:
    values = {
        ("kvrelay", 2, "w1", "tokens_per_s"): [20.0, 5.0],
        ("openvino", 2, "w1", "tokens_per_s"): [10.0, 5.0],
        ("kvrelay", 2, "ttft-32", "ttft_s"): [1.0, 2.0],
        ("openvino", 2, "ttft-32", "ttft_s"): [3.0, 4.0],
    }
    results = make_results(values, {"kvrelay": "0", "openvino": "1"})
    our_rate, their_rate, our_time, their_time = results
    assert (advantage(our_rate, their_rate).min, advantage(our_rate, their_rate).max) == (1.0, 2.0)
    assert advantage(our_time, their_time).median == 2.5
    assert find(results, "openvino", "w1", "tokens_per_s") == their_rate
    assert find(results, "openvino", "w2", "tokens_per_s") is None
    assert dataclasses.asdict(our_rate)["values"] == (20.0, 5.0)


def test_all_peers_of_a_round_get_the_same_prompts_and_no_two_prompts_begin_alike() -> None:
    runs = [each for name in ("w1", "ttft", "w2", "w3") for number in range(3) for each in runs_of(name, number, 600)]
    again = [each for name in ("w1", "ttft", "w2", "w3") for number in range(3) for each in runs_of(name, number, 600)]
    assert runs == again
    beginnings = [tuple(request.token_ids[:16]) for each in runs for request in each.requests]
    assert len(set(beginnings)) == len(beginnings)
