"""Many cheap calls at once: watches over one connection, and long lists."""

import asyncio
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway import service
from gateway.service import MAX_LISTING, MAX_PAGE_SIZE, InferenceService
from kvrelay.config.settings import GatewaySettings
from kvrelay.core.bounds import MAX_ADDRESS_BYTES, MAX_NAME_BYTES
from kvrelay.core.request_state import RequestState
from kvrelay.errors import OverloadedError
from kvrelay.network.rpc import bind_server, create_channel, create_server
from kvrelay.state.request_list import RequestPage
from kvrelay.state.request_record import RequestSummary
from kvrelay.testing.waiting import wait_until
from kvrelay.v1 import inference_pb2 as pb
from tests.support import raw_http2

NUM_WATCHES = 5000
LARGEST_MESSAGE_BYTES = 4 * 1024 * 1024
"""That gRPC's clients take by default."""
END_STREAM = 1


def watches(number: int) -> bytes:
    """Of a client that does not care how many calls a server allows."""
    headers = raw_http2.headers_of("/grpc.health.v1.Health/Watch")
    message = struct.pack(">BI", 0, 0)  # an empty request
    return b"".join(
        raw_http2.frame(raw_http2.HEADERS, raw_http2.END_HEADERS, 2 * each + 1, headers)
        + raw_http2.frame(raw_http2.DATA, END_STREAM, 2 * each + 1, message)
        for each in range(number)
    )


@pytest.mark.parametrize("obeys", [True, False])
async def test_thousands_of_watches_over_one_connection_are_as_many_as_it_may_have(obeys: bool) -> None:
    limits = GatewaySettings().connection_limits
    server = create_server(limits=limits)
    bound = bind_server(server, "127.0.0.1", 0, ())
    await server.start()
    address = f"127.0.0.1:{bound.port}"
    async with create_channel(address) as channel, create_channel(address) as other:
        if obeys:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            calls = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(NUM_WATCHES)]
            await wait_until(lambda: bound.health.num_watches == limits.max_streams, "as many as may run")
        else:
            connection = raw_http2.connect(bound.port)
            await asyncio.to_thread(raw_http2.pump, connection, watches(NUM_WATCHES))
            await wait_until(lambda: bound.health.num_watches > 0, "watches have come")
        beside: Any = health_pb2_grpc.HealthStub(other)
        for _ in range(20):  # while the server may take more of them
            await beside.Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert bound.health.num_watches <= limits.max_streams
        if obeys:
            for call in calls:
                call.cancel()
        else:
            connection.close()
        await wait_until(lambda: bound.health.num_watches == 0, "the watches are over")
    await server.stop(None)


def largest_summary(number: int) -> RequestSummary:
    name = "\U0001f30a" * (MAX_NAME_BYTES // 4)
    return RequestSummary(
        request_id=f"{number:032x}",
        state=RequestState.FAILED,
        attempt=2**32 - 1,
        tenant=name,
        model=name,
        gateway_id="g" * MAX_ADDRESS_BYTES,
        num_prompt_tokens=2**32 - 1,
        create_time_ms=2**41,
        update_time_ms=2**41,
        deadline_time_ms=2**41,
        remaining_ms=0,
        num_output_tokens=2**32 - 1,
        prefill_worker_id="p" * MAX_ADDRESS_BYTES,
        decode_worker_id="d" * MAX_ADDRESS_BYTES,
        error_message="\U0001f30a" * 5000,
    )


PAGE = [largest_summary(number) for number in range(MAX_PAGE_SIZE)]


class Requests:
    """Reads pages when `may_read` is set."""

    def __init__(self) -> None:
        self.num_reading = self.most_reading = 0
        self.may_read = asyncio.Event()

    async def read_page(self, page_size: int, page_token: str, active_only: bool) -> RequestPage:
        self.num_reading += 1
        self.most_reading = max(self.most_reading, self.num_reading)
        await self.may_read.wait()
        self.num_reading -= 1
        return RequestPage(PAGE[:page_size], "")


def listing(requests: Requests) -> InferenceService:
    gateway: Any = SimpleNamespace(preparation=None, known_requests=requests)
    return InferenceService(gateway)


async def page_of(inference: InferenceService) -> pb.ListRequestsResponse:
    context: Any = None
    return await inference.ListRequests(pb.ListRequestsRequest(page_size=MAX_PAGE_SIZE), context)


async def test_the_largest_page_is_within_what_every_client_takes() -> None:
    requests = Requests()
    requests.may_read.set()
    page = await page_of(listing(requests))
    assert len(page.requests) == MAX_PAGE_SIZE
    assert page.ByteSize() < LARGEST_MESSAGE_BYTES
    assert all(info.error_message for info in page.requests)


async def test_many_lists_at_once_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LISTED_AT_ONCE", 500)
    requests = Requests()
    inference = listing(requests)
    asked = [asyncio.create_task(page_of(inference)) for _ in range(MAX_LISTING + service.MAX_WAITING_LISTS + 10)]
    await wait_until(lambda: sum(each.done() for each in asked) == 10, "those above the bound are refused")
    requests.may_read.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(each, OverloadedError) for each in answers) == 10
    assert sum(isinstance(each, pb.ListRequestsResponse) for each in answers) == len(asked) - 10
    assert requests.most_reading == MAX_LISTING


async def test_a_long_list_lets_others_run_between() -> None:
    requests = Requests()
    requests.may_read.set()
    listed, num_turns = asyncio.create_task(page_of(listing(requests))), 0
    while not listed.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns >= MAX_PAGE_SIZE / service.LISTED_AT_ONCE
