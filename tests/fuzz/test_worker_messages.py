"""A gateway whose workers say anything at all: requests end with tokens or typed errors, never by a
defect of the gateway.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import grpc
import pytest

from gateway.requests import runner
from gateway.workers import sessions
from kvrelay.errors import DeadlineError, InternalError, InvalidRequestError, OverloadedError, UnavailableError
from kvrelay.v1 import decode_pb2, prefill_pb2
from kvrelay.wire.errors import error_of_rpc
from tests.fuzz.mutations import mutate_message
from tests.gateway.conftest import Bench, Gateway, read_all, token_request
from tests.gateway.conftest import bench as bench  # a fixture
from tests.support.fake_workers import FakeDecodeWorker, FakeWorker

PROMPT = list(range(10, 40))
NUM_TOKENS = 12
NUM_CLIENTS = 4
TIMEOUT_S = 2.0
"""A message that claims an end makes a gateway wait for the rest until then."""
SHARE_OF_ODD_MESSAGES = 0.15
TYPED = (InternalError, UnavailableError, InvalidRequestError, OverloadedError, DeadlineError)


def say_anything(worker: FakeWorker, seed: int) -> None:
    """Before some of its messages the worker sends what somebody made of them."""
    is_decode = isinstance(worker, FakeDecodeWorker)
    response_type = decode_pb2.DecodeServiceSessionResponse if is_decode else prefill_pb2.PrefillServiceSessionResponse
    generator, send = random.Random(seed), worker._send

    def send_odd_too(**fields: Any) -> None:
        if generator.random() < SHARE_OF_ODD_MESSAGES:
            odd = response_type(**fields)
            name = odd.WhichOneof("message")
            assert name is not None, "every message says something"
            mutate_message(getattr(odd, name) if generator.random() < 0.8 else odd, generator)
            name = odd.WhichOneof("message")
            if name is not None:
                send(**{name: getattr(odd, name)})
        send(**fields)

    worker._send = send_odd_too  # type: ignore[method-assign]


async def ask(gateway: Gateway, generator: random.Random, num_requests: int) -> Counter[str]:
    """How so many requests ended, one after the other."""
    ends: Counter[str] = Counter()
    for _ in range(num_requests):
        request = token_request(PROMPT, NUM_TOKENS, sampling_n=generator.choice([1, 1, 2]))
        try:
            await read_all(gateway.stub.Generate(request, timeout=TIMEOUT_S))
        except grpc.aio.AioRpcError as failure:
            error = error_of_rpc(failure)
            assert isinstance(error, TYPED), error
            ends[type(error).__name__] += 1
        else:
            ends["success"] += 1
    return ends


@pytest.mark.parametrize("num_requests", [12, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
async def test_what_workers_say_is_no_defect_of_the_gateway(
    bench: Bench, num_requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    defects: list[str] = []
    for module in (runner, sessions):
        monkeypatch.setattr(module._log, "exception", lambda event, **_: defects.append(event), raising=False)
    workers = [await bench.workers.add_prefill(), await bench.workers.add_decode()]
    await bench.announce(*workers)
    gateway = await bench.gateway()
    for worker in workers:
        say_anything(worker, num_requests)
    generators = [random.Random(number) for number in range(NUM_CLIENTS)]
    ends = sum(
        await asyncio.gather(*(ask(gateway, generator, num_requests) for generator in generators)), Counter[str]()
    )
    assert not defects
    assert ends["success"] > ends.total() / 4, ends
