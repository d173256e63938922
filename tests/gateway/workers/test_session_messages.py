"""What a worker says is cut or refused where no worker of ours would say it."""

import pytest

from gateway.lifecycle import events
from gateway.workers.session_messages import MAX_END_TOKENS, MAX_FAILURE_CHARACTERS, identity, to_events
from kvrelay.core.bounds import MAX_ADDRESS_BYTES
from kvrelay.core.chunk_times import MAX_CHUNK_TIMES
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import decode_pb2, session_pb2
from kvrelay.wire.convert import model_to_pb
from tests.support.fake_workers import MODEL


def greeting() -> session_pb2.WorkerHello:
    return session_pb2.WorkerHello(worker_id="w", model=model_to_pb(MODEL), block_size=16, max_sequence_tokens=64)


@pytest.mark.parametrize("name", ["name", "fingerprint", "architecture", "dtype"])
def test_a_model_has_short_names(name: str) -> None:
    hello = greeting()
    setattr(hello.model, name, "x" * (MAX_ADDRESS_BYTES + 1))
    with pytest.raises(InvalidRequestError, match=f"hello.model.{name} has"):
        identity(hello)


def test_a_worker_has_a_short_id_and_few_end_tokens() -> None:
    assert identity(greeting()).worker_id == "w"
    long = greeting()
    long.worker_id = "w" * 129
    with pytest.raises(InvalidRequestError, match=r"hello\.worker_id has 129 bytes"):
        identity(long)
    many = greeting()
    many.model.eos_token_ids.extend([1] * (MAX_END_TOKENS + 1))
    with pytest.raises(InvalidRequestError, match=r"hello\.model\.eos_token_ids has"):
        identity(many)


def test_a_sentence_about_a_failure_is_cut() -> None:
    failed = session_pb2.JobFailed(job_id=session_pb2.JobId(request_id="r", attempt=1), message="x" * 2**20)
    ((_, event),) = to_events("w", decode_pb2.DecodeServiceSessionResponse(job_failed=failed))
    assert isinstance(event, events.JobFailed)
    assert len(event.message) <= MAX_FAILURE_CHARACTERS + 3


def test_a_bounded_number_of_chunk_times_is_read() -> None:
    started = decode_pb2.DecodeStarted(job_id=session_pb2.JobId(request_id="r", attempt=1))
    for _ in range(MAX_CHUNK_TIMES + 5):
        started.chunks.add()
    ((_, event),) = to_events("w", decode_pb2.DecodeServiceSessionResponse(decode_started=started))
    assert isinstance(event, events.DecodeStarted)
    assert len(event.chunks) == MAX_CHUNK_TIMES
