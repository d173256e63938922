"""What goes through the wire's messages comes out equal."""

import math
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.job import (
    MAX_SHARE_WEIGHT,
    FailureKind,
    FinishReason,
    Job,
    JobId,
    SequenceToken,
    Token,
    TopLogprob,
    WorkerLoad,
)
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.core.sampling_params import SamplingDefaults, SamplingParams
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.wire import convert

uint32 = st.integers(0, 2**32 - 1)
float32 = st.floats(width=32, allow_nan=False)
samplings = st.builds(
    SamplingParams,
    temperature=float32,
    top_k=uint32,
    top_p=float32,
    min_p=float32,
    repetition_penalty=float32,
    presence_penalty=float32,
    frequency_penalty=float32,
    logit_bias=st.dictionaries(uint32, float32, max_size=4),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(uint32, max_size=3).map(tuple),
    min_tokens=uint32,
    max_tokens=st.none() | uint32,
    ignore_eos=st.booleans(),
    logprobs=st.none() | uint32,
    n=uint32,
    response_format=st.none() | st.builds(ResponseFormat, st.sampled_from(FormatKind), st.text(max_size=5)),
)
job_ids = st.builds(JobId, st.text("0123456789abcdef", min_size=32, max_size=32), uint32, uint32)
jobs = st.builds(
    Job,
    job_ids,
    st.lists(uint32, max_size=20).map(tuple),
    uint32,
    uint32,
    samplings,
    st.text(max_size=5),
    uint32,
    share_weight=st.integers(1, MAX_SHARE_WEIGHT),
)


@given(jobs)
def test_job_survives_reserve_and_start_prefill(job: Job) -> None:
    reserve = decode_pb2.Reserve.FromString(convert.reserve_to_pb(job, "f" * 32).SerializeToString())
    assert convert.job_from_pb(reserve) == job
    assert reserve.fingerprint == "f" * 32
    start = convert.start_prefill_to_pb(job, b"t" * 16, "127.0.0.1:1", 32)
    start = prefill_pb2.StartPrefill.FromString(start.SerializeToString())
    assert convert.job_from_pb(start) == job
    assert (start.ticket, start.push_address, start.num_cached_tokens) == (b"t" * 16, "127.0.0.1:1", 32)


def test_absent_sampling_fields_take_their_defaults() -> None:
    assert convert.sampling_from_pb(session_pb2.SamplingParams()) == SamplingParams()


@pytest.mark.parametrize("finish_reason", [None, *FinishReason])
@pytest.mark.parametrize("logprob", [None, struct.unpack("f", struct.pack("f", -0.7))[0]])
def test_a_sequences_token_survives(finish_reason: FinishReason | None, logprob: float | None) -> None:
    top = () if logprob is None else (TopLogprob(4, logprob), TopLogprob(5, -2.0))
    token = SequenceToken(JobId("r", 2, 1), 3, 7, Token(4, logprob, top), finish_reason)
    assert convert.sequence_token_from_pb(convert.sequence_token_to_pb(token)) == token


@pytest.mark.parametrize("kind", list(FailureKind))
def test_every_failure_kind_survives(kind: FailureKind) -> None:
    assert convert.failure_kind_from_pb(convert.failure_kind_to_pb(kind)) is kind


def test_a_failure_kind_of_a_later_version_counts_as_internal() -> None:
    message = session_pb2.JobFailed()
    message.ParseFromString(b"\x10\x63")  # field 2, value 99
    assert convert.failure_kind_from_pb(message.kind) is FailureKind.INTERNAL


def test_model_and_load_survive() -> None:
    model = ModelSpec("m", "llama", KVLayout(30, 3, 64, "float32"), 49152, 8192, (2, 5), "ab" * 16)
    assert convert.model_from_pb(convert.model_to_pb(model)) == model
    defaults = SamplingDefaults(0.6, 20, 0.95, 0.0, 1.05)
    stated = replace(model, sampling_defaults=defaults)
    assert (
        convert.model_from_pb(session_pb2.ModelInfo.FromString(convert.model_to_pb(stated).SerializeToString()))
        == stated
    )
    load = WorkerLoad(1, 2, 3, 4, 5, 6, 7, True, 8, 9, 10, 11)
    assert convert.load_from_pb(convert.load_to_pb(load)) == load
    measured = replace(load, prefill_tokens_per_s=800.5, prefill_step_ms=2.25, shared_prefill_tokens_per_s=64.0)
    assert convert.load_from_pb(convert.load_to_pb(measured)) == measured


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_a_rate_that_cannot_be_counts_as_not_measured(rate: float) -> None:
    assert convert.load_from_pb(session_pb2.WorkerLoad(prefill_tokens_per_s=rate)) == WorkerLoad()
