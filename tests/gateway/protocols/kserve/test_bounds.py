"""What one message or one stream of KServe's protocol may take."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.protocols.kserve import service as service_module
from gateway.protocols.kserve.requests import parse
from gateway.protocols.kserve.sampling_json import MAX_JSON_BYTES, parse_sampling_json
from gateway.protocols.kserve.service import KServeService
from kvrelay.errors import InvalidRequestError
from kvrelay.kserve import grpc_service_pb2 as pb
from tests.gateway.protocols.kserve.messages import infer_request


def refusal_of(text: str) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        parse_sampling_json(text)
    assert len(refused.value.message) < 300
    return refused.value


def test_a_long_text_of_parameters_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    assert "at most" in refusal_of("{" + " " * MAX_JSON_BYTES + "}").problem


@pytest.mark.parametrize(
    ("name", "entries"),
    [("stop", ["x"] * 17), ("stop_token_ids", [1] * 65), ("logit_bias", {str(number): 1 for number in range(1025)})],
    ids=["stop", "stop_token_ids", "logit_bias"],
)
def test_entries_are_counted_before_one_is_read(name: str, entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.protocols.kserve.sampling_json._scalar", lambda *_: pytest.fail("read"))
    refused = refusal_of(json.dumps({name: entries}))
    assert (refused.field, f"has {len(entries)} entries" in refused.problem) == (f"sampling_parameters.{name}", True)


def test_a_clients_id_is_short() -> None:
    with pytest.raises(InvalidRequestError, match="id has 129 bytes"):
        parse(infer_request({"text_input": "x"}, id="i" * 129))


async def test_a_stream_reads_no_more_requests_than_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_REQUESTS_PER_STREAM", 2)
    num_read, num_run, may_end = 0, 0, asyncio.Event()

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        nonlocal num_read
        for _ in range(10):
            num_read += 1
            yield infer_request({"text_input": "x"})

    async def run(*_: object) -> None:
        nonlocal num_run
        num_run += 1
        await may_end.wait()

    class Context:
        def add_done_callback(self, callback: object) -> None: ...

        def invocation_metadata(self) -> tuple[()]:
            return ()

    gateway: Any = None
    context: Any = Context()
    service = KServeService(gateway)
    monkeypatch.setattr(service, "_run", run)
    streaming = asyncio.create_task(service.ModelStreamInfer(requests(), context))
    for _ in range(50):
        await asyncio.sleep(0)
    assert (num_read, num_run) == (3, 2), "the third waits for a place"
    may_end.set()
    await asyncio.wait_for(streaming, 60)
    assert (num_read, num_run) == (10, 10)
