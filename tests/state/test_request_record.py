"""A record that was written is read back as it was."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.state.request_record import SUMMARY_FIELDS, RequestRecord, decode_record, decode_summary, encode_record
from tests.support.redis_fixtures import make_record

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100)),
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(TEXTS.filter(bool), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
    max_tokens=st.integers(1, 2**31),
    logprobs=st.none() | st.integers(0, 20),
)
RECORDS = st.builds(
    make_record,
    request_id=TEXTS,
    state=st.sampled_from(RequestState),
    attempt=st.integers(1, 99),
    tenant=TEXTS,
    error_message=TEXTS,
    cache_salt=TEXTS,
    resumable=st.booleans(),
    keeps_output=st.booleans(),
    prompt_token_ids=TOKENS,
    sampling=SAMPLING,
)


def as_stored(record: RequestRecord) -> dict[bytes, bytes]:
    """What Redis would answer, with its clock at 1000 when written."""
    flat = encode_record(record)
    fields = {str(name).encode(): _bytes(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}
    times = {b"update_time_ms": b"1000", b"redis_deadline_ms": str(1000 + record.remaining_ms).encode()}
    return fields | times


def _bytes(value: str | int | bytes) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@given(record=RECORDS)
def test_a_record_is_read_as_written_but_for_content_that_no_gateway_needs(record: RequestRecord) -> None:
    expected = dataclasses.replace(record, update_time_ms=1000, remaining_ms=record.remaining_ms - 7)
    if not record.keeps_output or is_terminal(record.state):
        nothing = SamplingParams(seed=0, max_tokens=1)
        expected = dataclasses.replace(expected, prompt_token_ids=(0,), sampling=nothing)
    assert decode_record(as_stored(record), now_ms=1007) == expected


@given(record=RECORDS)
def test_a_summary_says_the_same_as_the_record(record: RequestRecord) -> None:
    stored = as_stored(record)
    summary = decode_summary([stored[name.encode()] for name in SUMMARY_FIELDS], now_ms=1000)
    assert summary is not None
    assert all(
        getattr(summary, field.name) == getattr(decode_record(stored, 1000), field.name)
        for field in dataclasses.fields(summary)
    )


def test_nothing_is_left_of_a_deadline_that_has_passed() -> None:
    assert decode_record(as_stored(make_record(remaining_ms=10)), now_ms=99_999).remaining_ms == 0


def test_a_summary_of_a_forgotten_request_is_none() -> None:
    assert decode_summary([None] * len(SUMMARY_FIELDS), now_ms=0) is None
