"""Every row of the table of sampling parameters reaches every place that takes sampling parameters."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import typer
from typer.testing import CliRunner

from gateway.protocols.kserve.sampling_json import parse_sampling_json
from gateway.requests.request_validation import parse_sampling
from kvrelay.cli.sampling_options import takes_sampling
from kvrelay.client.requests import SamplingOptions, sampling_message
from kvrelay.core.response_format import ResponseFormat
from kvrelay.core.sampling_params import DEFAULTED_PARAMETERS, PARAMETERS, Parameter, SamplingParams
from kvrelay.errors import InvalidRequestError
from kvrelay.openai_frontend.request_fields import RefusedFieldError, check_fields
from kvrelay.state.request_record import decode_record
from kvrelay.v1 import session_pb2
from kvrelay.vllm_engine.messages import engine_pb
from kvrelay.vllm_engine.sampling import sampling_from_vllm
from kvrelay.wire import convert
from tests.state.test_request_record import as_stored
from tests.support.redis_fixtures import make_record

PATTERN = "a+"
OTHERWISE_IN_VLLM_ENGINE = {"response_format"}
"""Its message has `constraint` for it."""
ROWS = pytest.mark.parametrize("row", PARAMETERS.values(), ids=PARAMETERS)


def value_of(row: Parameter) -> Any:
    """A value that the row allows, and that is not its default."""
    high = row.range.high if row.range is not None else 0
    values: dict[Any, Any] = {
        float: high / 2,
        int: 3,
        int | None: 3,
        bool: not row.default,
        tuple[str, ...]: ("abc", "d"),
        tuple[int, ...]: (3, 4),
        Mapping[int, float]: {3: high / 2},
        ResponseFormat | None: ResponseFormat.regex(PATTERN),
    }
    return values[row.type]


def sampling_with(row: Parameter) -> SamplingParams:
    return SamplingParams(**{row.name: value_of(row)})


def test_a_row_stands_for_each_field_of_the_proto_and_of_a_models_defaults() -> None:
    assert set(PARAMETERS) == set(session_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    assert set(DEFAULTED_PARAMETERS) == set(session_pb2.SamplingDefaults.DESCRIPTOR.fields_by_name)
    assert set(DEFAULTED_PARAMETERS) < set(PARAMETERS)


def test_the_client_has_a_typed_keyword_for_each_row() -> None:
    assert set(SamplingOptions.__annotations__) == set(PARAMETERS)


@ROWS
def test_the_wire_carries_it_both_ways(row: Parameter) -> None:
    data = convert.sampling_to_pb(sampling_with(row)).SerializeToString()
    assert (
        convert.sampling_from_pb(session_pb2.SamplingParams.FromString(data)) == sampling_with(row) != SamplingParams()
    )


@ROWS
def test_the_client_sends_it_and_the_gateway_takes_it(row: Parameter) -> None:
    assert parse_sampling(sampling_message(cast(SamplingOptions, {row.name: value_of(row)}))) == sampling_with(row)


@pytest.mark.parametrize("row", [row for row in PARAMETERS.values() if row.range is not None], ids=lambda row: row.name)
def test_a_value_beyond_its_range_is_refused(row: Parameter) -> None:
    assert row.range is not None
    low, high = int(row.range.low) - 1, int(row.range.high) + 1
    wrong: list[Any] = [low, high]
    if row.type == tuple[str, ...]:
        wrong = [("",), ("x" * high,)]
    elif row.type == tuple[int, ...]:
        wrong = [(low,), (high,)]
    elif row.type == Mapping[int, float]:
        wrong = [{3: low}, {3: high}, {-1: 0}]
    for value in wrong:
        with pytest.raises(InvalidRequestError) as refused:
            SamplingParams(**{row.name: value}).validate()
        assert refused.value.field.partition("[")[0] == row.name


@ROWS
def test_an_option_of_the_command_line_gives_it(row: Parameter) -> None:
    given: dict[str, Any] = {}

    @takes_sampling
    def command(sampling: dict[str, Any]) -> None:
        given.update(sampling)

    app = typer.Typer()
    app.command()(command)
    value = value_of(row)
    flag = "--" + row.name.replace("_", "-").removesuffix("-ids")
    match value:
        case bool():
            arguments = [flag]
        case tuple():
            arguments = [part for entry in value for part in (flag, str(entry))]
        case dict():
            arguments = [flag, json.dumps(value)]
        case ResponseFormat():
            arguments = ["--regex", PATTERN]
        case _:
            arguments = [flag, str(value)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert given == {row.name: list(value) if isinstance(value, tuple) else value}


@ROWS
def test_kserves_json_gives_it(row: Parameter) -> None:
    value = {"regex": PATTERN} if row.name == "response_format" else value_of(row)
    assert parse_sampling(parse_sampling_json(json.dumps({row.name: value}))) == sampling_with(row)


def test_vllm_engines_message_has_a_field_for_each_row_but_these() -> None:
    assert set(PARAMETERS) - set(engine_pb.SamplingParams.DESCRIPTOR.fields_by_name) == OTHERWISE_IN_VLLM_ENGINE


@ROWS
def test_vllm_engines_message_gives_it(row: Parameter) -> None:
    fields = {"regex": PATTERN} if row.name == "response_format" else {row.name: value_of(row)}
    assert sampling_from_vllm(engine_pb.SamplingParams(**fields)) == sampling_with(row)


@ROWS
def test_openais_port_takes_it_or_says_that_it_does_not(row: Parameter) -> None:
    try:
        assert row.name in check_fields("chat/completions", {row.name: value_of(row)})
    except RefusedFieldError as refused:
        assert "is not supported" in str(refused)  # noqa: PT017 - most are taken


@ROWS
def test_the_state_store_keeps_it(row: Parameter) -> None:
    sampling = replace(SamplingParams(seed=1, max_tokens=9), **{row.name: value_of(row)})
    assert decode_record(as_stored(make_record(sampling=sampling)), 1000).sampling == sampling
