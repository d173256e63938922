"""Forgotten requests are freed by reference counts, because full garbage collections are rare."""

import gc
from collections.abc import Iterator

import grpc
import pytest

from gateway.requests import registry
from gateway.requests.runner import RequestRunner
from tests.gateway.conftest import Answer, Bench, eventually, read_all, read_into, token_request

PROMPT = list(range(5, 45))
NUM_REQUESTS = 5


def runners() -> list[RequestRunner]:
    # isinstance asks some objects of torch, which then warn
    return [each for each in gc.get_objects() if type(each) is RequestRunner]


@pytest.fixture
def earlier() -> Iterator[list[RequestRunner]]:
    """Runners that other tests of this process left; nothing is collected meanwhile."""
    gc.collect()
    gc.disable()
    yield runners()
    gc.enable()


@pytest.mark.parametrize("ending", ["succeeded", "too late", "left"])
async def test_an_ended_request_that_is_forgotten_needs_no_collection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, earlier: list[RequestRunner], ending: str
) -> None:
    monkeypatch.setattr(registry, "MAX_ENDED_REQUESTS", 0)
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

    async def forgotten() -> bool:
        """gRPC keeps the last call, and so its request, until the next one comes."""
        return sum(all(each is not other for other in earlier) for each in runners()) <= 1

    await eventually(forgotten)
