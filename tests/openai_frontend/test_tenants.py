"""Two clients with two keys at one front, with a real smg: each is its tenant at the gateway.

It is so whatever the gateway asks the front for.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from kvrelay.errors import AccessDeniedError
from kvrelay.testing.waiting import wait_until
from kvrelay.vllm_engine.messages import engine_grpc, engine_pb
from kvrelay.wire.errors import error_of_rpc
from tests.gateway.conftest import eventually
from tests.support.openai_front import ALICE, BOB, TENANTS, Behind, Front, running_front, write_keys

pytest.importorskip("smg")
pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

GATEWAYS = [Behind(keys=True), Behind(keys=True, certificates=True), Behind(certificates=True), Behind()]
LONG = "A prompt that is long enough for some blocks of the prefix cache, and that both tenants send alike."
NUM_SECONDS = 60.0


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=GATEWAYS, ids=str)
async def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Front]:
    async with running_front(tmp_path_factory.mktemp("front"), request.param) as front:
        yield front


async def ask(sdk: AsyncOpenAI, text: str = "hi", **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return await sdk.chat.completions.create(**({"model": "tiny", "messages": messages, "max_tokens": 4} | options))


async def finish_reason(stream: Any) -> str | None:
    """None where the stream ends before the answer does."""
    reason = None
    with contextlib.suppress(openai.APIError, httpx2.HTTPError):
        async for event in stream:
            reason = event.choices[0].finish_reason if event.choices else reason
    return reason


def cached(answer: Any) -> int:
    details = answer.usage.prompt_tokens_details
    return 0 if details is None else details.cached_tokens or 0


async def ids_by_tenant(front: Front) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for gateway in front.gateways:
        for request in await gateway.requests():
            found.setdefault(request.tenant, set()).add(request.request_id)
    return found


async def only_has_more(front: Front, tenant: str, number: int, before: dict[str, set[str]]) -> bool:
    after = await ids_by_tenant(front)
    new = {each: ids - before.get(each, set()) for each, ids in after.items()}
    assert {each for each, ids in new.items() if ids} <= {tenant}
    return len(new.get(tenant, ())) == number


async def test_every_request_of_a_client_is_its_tenants_and_nobody_elses(front: Front) -> None:
    for name in (ALICE, BOB):
        before = await ids_by_tenant(front)
        async with front.sdk(name) as sdk:
            assert (await ask(sdk)).choices[0].message.content
            events = [event async for event in await ask(sdk, stream=True)]
            assert "".join(event.choices[0].delta.content or "" for event in events if event.choices)
            several = await sdk.completions.create(model="tiny", prompt=["one", "two"], max_tokens=2)
            assert len(several.choices) == 2
            assert (await sdk.responses.create(model="tiny", input="hello", max_output_tokens=2)).output
        await eventually(functools.partial(only_has_more, front, TENANTS[name], 5, before))


async def test_the_prefix_cache_tells_a_tenant_of_its_own_prompts_only(front: Front) -> None:
    async with front.sdk(ALICE) as alice, front.sdk(BOB) as bob:
        assert cached(await ask(alice, LONG)) == 0
        assert cached(await ask(alice, LONG)) > 0
        assert cached(await ask(bob, LONG)) == 0
        assert cached(await ask(bob, LONG)) > 0


async def test_a_foreign_key_gets_401_and_asks_nothing(front: Front) -> None:
    num_jobs = front.decode.num_jobs
    async with front.sdk("mallory") as sdk:
        for stream in (False, True):
            with pytest.raises(openai.AuthenticationError):
                await ask(sdk, stream=stream)
    assert front.decode.num_jobs == num_jobs


async def test_an_id_that_is_no_request_in_progress_is_refused(front: Front) -> None:
    async with front.sdk(ALICE) as sdk:
        over = (await ask(sdk)).id
    num_jobs = front.decode.num_jobs
    for request_id in (over, "chatcmpl-" + "0" * 32 + "-x", "x", ""):
        async with grpc.aio.insecure_channel(front.relays[0]) as channel:
            call = engine_grpc.VllmEngineStub(channel).Generate(_generate(request_id))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert isinstance(error_of_rpc(refused.value), AccessDeniedError)
    assert front.decode.num_jobs == num_jobs


def _generate(request_id: str) -> Any:
    sampling = engine_pb.SamplingParams(max_tokens=1)
    return engine_pb.GenerateRequest(
        request_id=request_id, tokenized=engine_pb.TokenizedInput(input_ids=[10, 11]), sampling_params=sampling
    )


async def test_a_client_that_hangs_up_ends_its_request_behind_the_relay(front: Front) -> None:
    front.decode.hold("token:3")
    async with front.sdk(ALICE) as sdk:
        stream = await ask(sdk, stream=True, max_tokens=50)
        async for _ in stream:
            break
        await front.decode.wait_for("token:3")
        await stream.close()
        await wait_until(lambda: not front.workers.held(), "the workers hold nothing", NUM_SECONDS)
    front.decode.release("token:3")


async def test_what_a_gateway_refuses_reaches_the_client(front: Front) -> None:
    async with front.sdk(ALICE) as sdk:
        with pytest.raises(openai.BadRequestError, match="context"):
            await ask(sdk, "word " * 600)


@pytest.mark.asyncio(loop_scope="function")
async def test_the_quota_of_one_key_does_not_touch_another(tmp_path: Path) -> None:
    async with running_front(tmp_path, Behind(keys=True), alice={"running_requests": 1}) as front:
        front.decode.hold("token:3")
        async with front.sdk(ALICE) as alice, front.sdk(BOB) as bob:
            first = asyncio.create_task(ask(alice))
            await front.decode.wait_for("token:3")
            with pytest.raises(openai.RateLimitError) as refused:
                await ask(alice)
            assert "alice" in refused.value.message
            assert (await ask(bob, max_tokens=2)).choices
            front.decode.release("token:3")
            assert (await first).choices
            assert (await ask(alice)).choices


@pytest.mark.asyncio(loop_scope="function")
async def test_a_withdrawn_key_ends_its_streams_and_no_others(tmp_path: Path) -> None:
    async with running_front(tmp_path, Behind(keys=True)) as front:
        front.decode.hold("token:3")
        async with front.sdk(ALICE) as alice, front.sdk(BOB) as bob:
            of_alice, of_bob = [await ask(sdk, stream=True, max_tokens=5) for sdk in (alice, bob)]
            await front.decode.wait_for("token:3")
            write_keys(front.keys_file, BOB)
            assert await finish_reason(of_alice) is None
            with pytest.raises(openai.AuthenticationError):
                await ask(alice)
            front.decode.release("token:3")
            assert await finish_reason(of_bob) == "length"


@pytest.mark.asyncio(loop_scope="function")
async def test_one_of_two_gateways_dies_and_the_other_serves_both_tenants(tmp_path: Path) -> None:
    async with (
        running_front(tmp_path, Behind(keys=True), num_gateways=2) as front,
        front.sdk(ALICE) as alice,
        front.sdk(BOB) as bob,
    ):
        for sdk in (alice, bob, alice, bob):
            assert (await ask(sdk)).choices
        front.gateways[0].task.cancel()
        await asyncio.wait([front.gateways[0].task])

        async def serve_alone() -> bool:
            """smg has noticed: none of four in turn meets the dead one."""
            try:
                return all([(await ask(sdk)).choices for sdk in (alice, bob, alice, bob)])
            except openai.InternalServerError:
                return False

        await eventually(serve_alone, NUM_SECONDS)
        assert await front.gateways[1].tenants() == set(TENANTS.values())
