"""Tokens of a request that came straight to a decode worker: each once, in order, over two
attempts.
"""

from decode_worker.vllm_engine.continuation import Continuation
from kvrelay.core.job import FinishReason, Job, JobId, SequenceToken, Token
from kvrelay.core.sampling_params import SamplingParams


def job(num_sequences: int = 1) -> Job:
    return Job(JobId("r", 1), (1, 2, 3), 3, num_sequences, SamplingParams(max_tokens=4, seed=1), "", 1000)


def token(index: int, *, sequence: int = 0, attempt: int = 1, reason: FinishReason | None = None) -> SequenceToken:
    return SequenceToken(JobId("r", attempt), sequence, index, Token(100 + index), reason)


def test_a_first_token_that_comes_late_goes_out_first_all_the_same() -> None:
    continuation = Continuation(job())
    assert continuation.add([token(1)]) == {}
    assert continuation.add([token(0)]) == {0: [Token(100), Token(101)]}
    assert not continuation.ended


def test_a_token_that_comes_twice_goes_out_once() -> None:
    continuation = Continuation(job())
    continuation.add([token(0)])
    assert continuation.add([token(0), token(1, reason=FinishReason.LENGTH)]) == {0: [Token(101)]}
    assert (continuation.ended, continuation.reasons) == (True, [FinishReason.LENGTH])


def test_the_next_attempt_goes_on_where_the_first_was_and_hears_nothing_of_it() -> None:
    continuation = Continuation(job())
    continuation.add([token(0), token(2)])
    continuation.begin_again(500)
    assert (continuation.job.token_ids, continuation.job.job_id.attempt, continuation.job.deadline_ms) == (
        (1, 2, 3, 100),
        2,
        500,
    )
    assert continuation.job.first_index == 1
    assert continuation.add([token(1)]) == {}
    assert continuation.add([token(1, attempt=2)]) == {0: [Token(101)]}


def test_a_request_has_ended_when_all_its_sequences_have() -> None:
    continuation = Continuation(job(2))
    continuation.add([token(0, sequence=1, reason=FinishReason.STOP)])
    assert not continuation.ended
    continuation.add([token(0, reason=FinishReason.LENGTH)])
    assert (continuation.ended, continuation.reasons) == (True, [FinishReason.LENGTH, FinishReason.STOP])
