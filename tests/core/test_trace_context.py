"""`traceparent` as W3C says it: what it means, what is as if it were absent, and what logs say of
it.
"""

import pytest

from kvrelay.core.trace_context import TraceContext, adopt, current_trace, is_trace_id, log_fields, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True)])
def test_a_header_names_a_span_and_whether_it_is_sampled(flags: str, sampled: bool) -> None:
    assert parse_traceparent(f" 00-{TRACE}-{SPAN}-{flags} ") == TraceContext(TRACE, SPAN, sampled)


def test_a_context_is_written_as_it_is_read() -> None:
    for sampled in (True, False):
        context = TraceContext(TRACE, SPAN, sampled)
        assert parse_traceparent(context.traceparent) == context


def test_a_later_version_may_have_more_behind() -> None:
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01-more") == TraceContext(TRACE, SPAN, True)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "garbage",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
    ],
)
def test_what_is_none_is_as_if_it_were_absent(header: str) -> None:
    assert parse_traceparent(header) is None


def test_a_call_belongs_to_the_trace_that_its_metadata_name() -> None:
    adopt([("other", "x"), ("traceparent", f"00-{TRACE}-{SPAN}-01")])
    assert current_trace() == TraceContext(TRACE, SPAN, True)
    adopt([("traceparent", "garbage")])
    assert current_trace() is None


def test_lines_of_a_log_name_the_clients_trace_or_the_requests_own() -> None:
    request_id = "1" * 32
    assert is_trace_id(request_id)
    assert not is_trace_id("0" * 32)
    assert log_fields(request_id, 2, None) == {"request_id": request_id, "attempt": 2, "trace_id": request_id}
    assert log_fields(request_id, 2, TraceContext(TRACE, SPAN, False))["trace_id"] == TRACE
