"""What a gateway forgets is gone at once: full garbage collections are rare, and frames of requests are what it has most of."""

import gc
from collections.abc import Iterator

import grpc
import pytest

from gateway import running_requests
from gateway.request_runner import RequestRunner
from tests.gateway.conftest import Answer, Bench, eventually, read_all, read_into, token_request

PROMPT = list(range(5, 45))
NUM_REQUESTS = 5


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def forgotten() -> bool:
    """gRPC keeps the last call until the next one comes, and so its request."""
    return sum(isinstance(each, RequestRunner) for each in gc.get_objects()) <= 1


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("ending", ["succeeded", "too late", "left"])
async def test_an_ended_request_that_is_forgotten_needs_no_collection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(running_requests, "MAX_ENDED_REQUESTS", 0)
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway(timeline_requests=1)
    for number in range(NUM_REQUESTS):
        request = token_request([*PROMPT, number])
        if ending == "succeeded":
            await read_all(gateway.stub.Generate(request))
            continue
        decode.hold("token:3")
        if ending == "too late":
            with pytest.raises(grpc.aio.AioRpcError):
                await read_into(Answer(), gateway.stub.Generate(request, timeout=0.3))
        else:
            call = gateway.stub.Generate(request)
            await call.read()
            call.cancel()
    await bench.at_rest()
    await eventually(forgotten)
