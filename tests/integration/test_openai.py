"""OpenAI's API by smg over a cluster with the real model: the unmodified openai SDK, curl, and the
KV bytes of requests.
"""

import asyncio
import json
import re
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from transformers import AutoConfig

from kvrelay.client import AsyncClient, Cluster, Completion, WorkerRole
from kvrelay.cluster.local_cluster import AnySettings, LocalCluster
from kvrelay.config.settings import OpenAISettings
from kvrelay.openai_frontend import readiness, smg
from kvrelay.runtime.child_process import ChildProcess
from tests.integration.clusters import assert_at_rest, cluster_of, engine, wait_until, workers

pytestmark = [
    pytest.mark.integration,
    pytest.mark.real_model,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

PAGE = (Path(__file__).parents[2] / "docs/guides/clients.md").read_text("utf-8")
PAGE_ADDRESS = "127.0.0.1:8000"
MODEL = "smollm2-135m-instruct"
CALL_TIMEOUT_S = 120.0


def chat(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(smollm2_path: Path) -> AsyncIterator[LocalCluster]:
    # Without a prefix cache every prompt's KV travels as a whole, also of prompts that begin alike.
    settings = engine(smollm2_path, kv_cache_mib=256, prefix_cache=False, served_model_name=MODEL)
    cluster = cluster_of([settings], [settings], local_prefill_tokens=0)
    cluster.openai = OpenAISettings(port=0)
    cluster.adjust = without_cluster_key
    async with cluster:
        yield cluster


def without_cluster_key(name: str, settings: AnySettings) -> AnySettings:
    """Lets a process that is not the cluster's ask its workers: smg in its own prefill/decode mode."""
    security = settings.security.model_copy(update={"cluster_key_file": None})
    return settings.model_copy(update={"security": security})


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.gateway_address) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def sdk(cluster: LocalCluster) -> AsyncIterator[AsyncOpenAI]:
    url = f"http://{cluster.openai_address}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=CALL_TIMEOUT_S) as sdk:
        yield sdk


@pytest.fixture(scope="module")
def bytes_per_token(smollm2_path: Path) -> int:
    config: Any = AutoConfig.from_pretrained(smollm2_path)
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4)


async def last_completion(client: AsyncClient) -> Completion:
    """Of the newest request that the gateway knows: smg's requests have ids of their own."""
    newest = (await client.cluster()).running_requests or (await client.list_requests(page_size=1)).requests
    return await client.resume(newest[0].request_id).completion()


async def assert_kv_travelled(client: AsyncClient, num_prompt_tokens: int, bytes_per_token: int) -> None:
    """All of the last prompt's KV came over the wire."""
    finished = (await last_completion(client)).finished
    assert finished.usage.num_prompt_tokens == num_prompt_tokens
    assert finished.phases.transfer_bytes == bytes_per_token * num_prompt_tokens > 0


async def test_a_chat_and_its_stream_give_the_text_that_our_own_client_gets(
    sdk: AsyncOpenAI, client: AsyncClient, bytes_per_token: int
) -> None:
    messages = chat("What is the capital of France?")
    expected = await client.complete(messages=messages, max_tokens=24, temperature=0)
    options: Any = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24}

    answer = await sdk.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.finished.usage.num_prompt_tokens
    assert answer.usage.completion_tokens == expected.finished.usage.num_output_tokens
    await assert_kv_travelled(client, answer.usage.prompt_tokens, bytes_per_token)

    events = [
        event
        async for event in await sdk.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert (
        "".join(event.choices[0].delta.content or "" for event in events if event.choices) == expected.outputs[0].text
    )
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert len(events) > expected.finished.usage.num_output_tokens // 2, "it came in pieces"
    assert events[-1].usage == answer.usage
    await assert_kv_travelled(client, answer.usage.prompt_tokens, bytes_per_token)
    await assert_at_rest(client)


async def test_completions_of_one_and_several_prompts_stream_and_stop_at_length(
    sdk: AsyncOpenAI, client: AsyncClient, bytes_per_token: int
) -> None:
    prompts = ["The capital of France is", "Once upon a time, in a small village by the sea,"]
    expected = [(await client.complete(prompt, max_tokens=8, temperature=0)).outputs[0].text for prompt in prompts]
    both = await sdk.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=8)
    assert [choice.text for choice in both.choices] == expected
    assert {choice.finish_reason for choice in both.choices} == {"length"}

    stream = await sdk.completions.create(model=MODEL, prompt=prompts[0], temperature=0, max_tokens=8, stream=True)
    assert "".join([event.choices[0].text async for event in stream]) == expected[0]
    await assert_kv_travelled(client, len(await client.tokenize(prompts[0])), bytes_per_token)


async def test_output_ends_before_a_stop_string_streamed_or_not(sdk: AsyncOpenAI) -> None:
    options: Any = {"model": MODEL, "messages": chat("Count from one to five."), "temperature": 0, "max_tokens": 40}
    whole = (await sdk.chat.completions.create(**options)).choices[0].message.content or ""
    assert "3." in whole
    stopped = (await sdk.chat.completions.create(**options, stop=["3."])).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole.partition("3.")[0], "stop")
    events = [
        event.choices[0] async for event in await sdk.chat.completions.create(**options, stop=["3."], stream=True)
    ]
    assert "".join(event.delta.content or "" for event in events) == whole.partition("3.")[0]
    assert events[-1].finish_reason == "stop"


async def test_log_probabilities_are_those_of_our_own_client(sdk: AsyncOpenAI, client: AsyncClient) -> None:
    messages = chat("What is the capital of France?")
    expected = (await client.complete(messages=messages, max_tokens=4, temperature=0, logprobs=3)).outputs[0].tokens
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.logprob for entry in logprobs.content] == pytest.approx(
        [token.logprob for token in expected], rel=1e-4
    )
    for entry, token in zip(logprobs.content, expected, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [top.logprob for top in token.top_logprobs], rel=1e-4
        )


@pytest.mark.parametrize("streams", [False, True])
async def test_bytes_of_tokens_that_are_parts_of_characters_make_up_the_text(sdk: AsyncOpenAI, streams: bool) -> None:
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "signs", "schema": {"const": "\U0001f600\u65e5\u672c\u00e9\U0001f389"}},
    }
    options: Any = {
        "model": MODEL,
        "messages": chat("x"),
        "max_tokens": 40,
        "logprobs": True,
        "response_format": wanted,
    }
    if streams:
        events = [event async for event in await sdk.chat.completions.create(**options, stream=True)]
        text = "".join(event.choices[0].delta.content or "" for event in events)
        entries = [
            entry for event in events if event.choices[0].logprobs for entry in event.choices[0].logprobs.content or ()
        ]
    else:
        (choice,) = (await sdk.chat.completions.create(**options)).choices
        assert choice.logprobs is not None
        text, entries = choice.message.content or "", choice.logprobs.content or []
    assert text == '"\U0001f600\u65e5\u672c\u00e9\U0001f389"'
    assert len(entries) > len(text), "some characters are made of several tokens"
    assert bytes(value for entry in entries for value in entry.bytes or ()).startswith(text.encode())
    assert "\ufffd" not in "".join(entry.token for entry in entries)


async def test_a_field_that_would_change_nothing_is_refused_by_name(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        await sdk.chat.completions.create(model=MODEL, messages=chat("x"), logit_bias={"5": 1}, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        await sdk.completions.create(model=MODEL, prompt="x", logprobs=2, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="temprature"):
        await sdk.completions.create(model=MODEL, prompt="x", max_tokens=1, extra_body={"temprature": 0})


async def test_a_tool_call_without_arguments_may_be_sent_back(sdk: AsyncOpenAI) -> None:
    call: Any = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
    asking: Any = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer: Any = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
    messages = [*chat("What time is it?"), asking, answer]
    assert (await sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)).choices


async def test_several_choices_differ_and_come_again_with_the_same_seed(
    sdk: AsyncOpenAI, client: AsyncClient, bytes_per_token: int
) -> None:
    options: Any = {
        "model": MODEL,
        "messages": chat("Tell me a story."),
        "temperature": 1,
        "n": 3,
        "seed": 7,
        "max_tokens": 10,
    }
    first = await sdk.chat.completions.create(**options)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert first.usage is not None
    await assert_kv_travelled(client, first.usage.prompt_tokens, bytes_per_token)
    streamed = ["", "", ""]
    async for event in await sdk.chat.completions.create(**options, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


async def test_smg_in_its_prefill_decode_mode_straight_on_the_workers_gives_our_gateways_text(
    client: AsyncClient, bytes_per_token: int
) -> None:
    messages = chat("Name three rivers of Europe and where they end.")
    expected = (
        (await client.complete(messages=messages, max_tokens=24, temperature=0, tenant="expected")).outputs[0].text
    )
    cluster = await client.cluster()
    before = kv_bytes(cluster)
    (prefill,), (decode,) = workers(cluster, WorkerRole.PREFILL), workers(cluster, WorkerRole.DECODE)
    port = free_port()
    command = smg.command_without_gateway(smg.SmgPorts(port, free_port()), [prefill.address], [decode.address])
    process = ChildProcess("smg", command, smg.environment(), lambda name, line: None)
    await process.start()
    try:
        async with asyncio.timeout(60):
            await readiness.wait_for_smg(f"127.0.0.1:{port}")
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as sdk:
            options: Any = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24}
            answer = await sdk.chat.completions.create(**options)
            assert answer.choices[0].message.content == expected
            stream = await sdk.chat.completions.create(**options, stream=True)
            assert "".join([event.choices[0].delta.content or "" async for event in stream]) == expected
            both = await sdk.chat.completions.create(**(options | {"n": 2, "temperature": 1, "seed": 3}))
            assert len({choice.message.content for choice in both.choices}) == 2
    finally:
        await process.stop(5.0)
    assert answer.usage is not None
    # not for two choices: what is pushed continues once
    pushed = 2 * bytes_per_token * answer.usage.prompt_tokens
    await wait_until(
        lambda: has_kv_bytes(client, before[0] + pushed, before[1] + pushed), "both workers tell what was pushed"
    )
    await assert_at_rest(client)


def kv_bytes(cluster: Cluster) -> tuple[int, int]:
    """KV bytes that prefill workers sent and decode workers received."""
    sent, received = (
        sum(worker.load.kv_transfer_bytes for worker in workers(cluster, role))
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE)
    )
    return sent, received


async def has_kv_bytes(client: AsyncClient, sent: int, received: int) -> bool:
    return kv_bytes(await client.cluster()) == (sent, received)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_what_is_wrong_is_told_with_the_status_that_openai_would_give(sdk: AsyncOpenAI) -> None:
    messages = chat("Hello")
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="unknown", messages=messages)
    with pytest.raises(openai.BadRequestError):
        await sdk.chat.completions.create(model=MODEL, messages=messages, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="context length"):
        await sdk.completions.create(model=MODEL, prompt="hello " * 9000, max_tokens=4)
    with pytest.raises(openai.InternalServerError, match="embeddings are not computed"):
        await sdk.embeddings.create(model=MODEL, input="hello")


async def test_a_client_that_hangs_up_leaves_nothing_behind(sdk: AsyncOpenAI, client: AsyncClient) -> None:
    stream = await sdk.completions.create(model=MODEL, prompt="One day", temperature=0, max_tokens=4000, stream=True)
    async for _ in stream:
        break
    assert len((await client.cluster()).running_requests) == 1
    await stream.close()
    await assert_at_rest(client)


async def test_a_tool_that_must_be_called_is_and_what_it_answered_is_in_the_next_prompt(sdk: AsyncOpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool: Any = {
        "type": "function",
        "function": {"name": "get_weather", "description": "Tells the weather", "parameters": parameters},
    }
    asked = chat("What is the weather in Paris?")
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 60, "tools": [tool]}
    called = (await sdk.chat.completions.create(**options, messages=asked, tool_choice="required")).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.tool_calls is not None
    call: Any = called.message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}

    # the model's template wants one
    asking: Any = called.message.model_dump(exclude_none=True) | {"content": ""}
    answer: Any = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    first = await sdk.chat.completions.create(**options | {"max_tokens": 1}, messages=asked)
    second = await sdk.chat.completions.create(**options | {"max_tokens": 1}, messages=[*asked, asking, answer])
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


async def test_output_has_the_form_that_a_schema_asks_for(sdk: AsyncOpenAI) -> None:
    properties = {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}
    schema = {"type": "object", "properties": properties, "required": ["name", "age"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    messages = chat("Invent a person.")
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=messages, seed=5, max_tokens=80, response_format=wanted
    )
    assert answer.choices[0].finish_reason == "stop"
    person = json.loads(answer.choices[0].message.content or "")
    assert (type(person["name"]), type(person["age"]), len(person)) == (str, int, 2)
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError):
        await sdk.chat.completions.create(model=MODEL, messages=messages, response_format=wrong)


async def test_the_pages_examples_run_as_they_stand(cluster: LocalCluster) -> None:
    section, structured = (
        PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in ("OpenAI", "Structured output")
    )
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    code += [example for example in re.findall(r"```python\n(.*?)```", structured, re.DOTALL) if "openai" in example]
    commands = [line for line in section.splitlines() if line.startswith("curl ")]
    assert (len(code), len(commands)) == (2, 2)
    programs = [*([sys.executable, "-c", example] for example in code), *map(shlex.split, commands)]
    outputs = [
        await output_of([part.replace(PAGE_ADDRESS, cluster.openai_address) for part in program])
        for program in programs
    ]
    assert outputs[0].startswith("The capital of France is Paris")
    assert outputs[1] in ('{"city": "Paris"}\n', '{"city": "Rome"}\n')
    assert MODEL in outputs[2]
    assert "The capital of France is Paris" in outputs[3]


async def output_of(command: list[str]) -> str:
    """Standard output of a program that must succeed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            output, _ = await process.communicate()
    except BaseException:
        process.kill()
        raise
    assert process.returncode == 0, shlex.join(command)
    return output.decode()
