"""Clients that know nothing of kvrelay, in processes of their own, against one cluster with the
real model: Triton's, unmodified, one that has only reflection, a health probe. And every example of
docs/guides/clients.md that needs no other server.
"""

import ast
import asyncio
import json
import re
import shlex
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoConfig

from kvrelay.client import AsyncClient
from kvrelay.cluster.local_cluster import LocalCluster
from tests.integration.clusters import assert_at_rest, cluster_of, engine
from tests.integration.triton_environment import triton_client_folder, triton_environment
from tools.doc_examples import blocks

pytestmark = [
    pytest.mark.integration,
    pytest.mark.real_model,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs/guides/clients.md").read_text("utf-8")
PAGE_ADDRESS = "127.0.0.1:50050"
PROGRAMS = {"grpcurl": "reflection_client.py", "grpc_health_probe": "health_probe.py"}
"""Programs that the page calls, and what stands for them here, where they are not installed."""
CALL_TIMEOUT_S = 120.0
PROMPTS = ("The capital of France is", "Once upon a time, in a small village by the sea,")
SAMPLING: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def installing() -> AsyncIterator["asyncio.Task[Path]"]:
    """Triton's client is installed while the cluster starts."""
    task = asyncio.create_task(asyncio.to_thread(triton_client_folder))
    yield task
    await asyncio.wait([task])


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(smollm2_path: Path, installing: "asyncio.Task[Path]") -> AsyncIterator[LocalCluster]:
    settings = engine(smollm2_path, kv_cache_mib=256)
    async with cluster_of([settings], [settings], local_prefill_tokens=0) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def triton_folder(cluster: LocalCluster, installing: "asyncio.Task[Path]") -> Path:
    return await installing


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.gateway_address) as client:
        yield client


@pytest.fixture(scope="module")
def bytes_per_token(smollm2_path: Path) -> int:
    config: Any = AutoConfig.from_pretrained(smollm2_path)
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4)


async def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and standard output of a program."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            output, _ = await process.communicate()
    except BaseException:
        process.kill()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode()


async def output_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a program that must succeed."""
    code, output = await run(command, environment)
    assert code == 0, f"{shlex.join(command)} ended with {code}"
    return output


async def expected_texts(client: AsyncClient) -> list[str]:
    """What our own client gets for the prompts."""
    return [(await client.complete(prompt, tenant="expected", **SAMPLING)).outputs[0].text for prompt in PROMPTS]


async def assert_kv_travelled(client: AsyncClient, request_id: str, prompt: str, bytes_per_token: int) -> None:
    """All of the prompt's KV came over the wire."""
    finished = (await client.resume(request_id).completion()).finished
    assert finished.usage.num_cached_tokens == 0
    assert finished.phases.transfer_bytes == bytes_per_token * len(await client.tokenize(prompt))


async def test_tritons_client_gets_answers_streams_and_typed_errors(
    cluster: LocalCluster, client: AsyncClient, triton_folder: Path, bytes_per_token: int
) -> None:
    model = (await client.list_models())[0].model.name
    script = [sys.executable, str(HERE / "triton_calls.py"), cluster.gateway_address, model]
    got = json.loads(
        await output_of([*script, json.dumps(PROMPTS), json.dumps(SAMPLING)], triton_environment(triton_folder))
    )
    about = got["about"]
    assert (about["live"], about["ready"], about["model_ready"], about["other_model_ready"]) == (
        True,
        True,
        True,
        False,
    )
    assert (about["server"], about["decoupled"], about["index"]) == ("kvrelay", True, [model])
    assert about["inputs"][0] == "text_input"

    texts = await expected_texts(client)
    unary = got["unary"]
    assert (unary["id"], unary["final"], unary["text_output"], unary["finish_reason"]) == (
        "one",
        True,
        [texts[0]],
        ["length"],
    )
    assert unary["num_output_tokens"] == [SAMPLING["max_tokens"]]
    assert unary["num_input_tokens"] == [len(await client.tokenize(PROMPTS[0]))]
    await assert_kv_travelled(client, unary["request_id"], PROMPTS[0], bytes_per_token)

    for number, prompt in enumerate(PROMPTS):
        answers = got["streamed"][str(number)]  # one for each token, unless several waited together
        assert "".join(answer["text_output"][0] for answer in answers) == texts[number]
        assert [answer["final"] for answer in answers] == [False] * (len(answers) - 1) + [True]
        assert answers[-1]["finish_reason"] == ["length"]
        await assert_kv_travelled(client, answers[0]["request_id"], prompt, bytes_per_token)
    assert ["best_of is not known" in error["message"] for error in got["streamed"]["errors"]] == [True, True]
    assert got["refused"]["status"] == "StatusCode.INVALID_ARGUMENT"
    assert "sampling_parameters.temperature" in got["refused"]["message"]
    await assert_at_rest(client)


async def test_a_client_with_nothing_but_reflection_finds_the_services_and_generates(
    cluster: LocalCluster, client: AsyncClient, bytes_per_token: int
) -> None:
    script = [sys.executable, str(HERE / "reflection_client.py"), "-plaintext"]
    services = (await output_of([*script, cluster.gateway_address, "list"])).split()
    assert {"kvrelay.v1.InferenceService", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(services)
    listed = await asyncio.gather(
        *(output_of([*script, cluster.gateway_address, "list", service]) for service in services)
    )
    for service, methods in zip(services, listed, strict=True):
        assert methods.startswith(f"{service}.")

    request = {"text": PROMPTS[0], "tenant": "reflection", "sampling": {"maxTokens": 12, "temperature": 0}}
    method = "kvrelay.v1.InferenceService/Generate"
    lines = (await output_of([*script, "-d", json.dumps(request), cluster.gateway_address, method])).splitlines()
    events = [json.loads(line) for line in lines]
    text = "".join(event["delta"].get("text", "") for event in events if "delta" in event)
    assert text == (await expected_texts(client))[0]
    assert list(events[0]) == ["accepted"]
    num_prompt_tokens = events[0]["accepted"]["numPromptTokens"]
    assert int(events[-1]["finished"]["phases"]["transferBytes"]) == bytes_per_token * num_prompt_tokens


async def test_a_health_probe_tells_a_serving_process_from_an_unknown_service_and_from_nothing(
    cluster: LocalCluster,
) -> None:
    script = [sys.executable, str(HERE / "health_probe.py"), f"-addr={cluster.gateway_address}"]
    assert await output_of(script) == "status: SERVING\n"
    assert await run([*script, "-service=inference.GRPCInferenceService"]) == (0, "status: SERVING\n")
    assert (await run([*script, "-service=unknown"]))[0] == 3


# --- docs/guides/clients.md -----------------------------------------------------------------------


async def test_the_pages_examples_in_python_run_as_they_stand(
    cluster: LocalCluster, client: AsyncClient, triton_folder: Path
) -> None:
    own, others = blocks(PAGE, "Python", "python"), blocks(PAGE, "KServe and Triton", "python")
    assert (len(own), len(others)) == (2, 2)
    prompt = "The capital of France is"
    text = (await client.complete(prompt, max_tokens=16, temperature=0)).outputs[0].text
    environment = triton_environment(triton_folder)

    async def check(example: str, variables: Mapping[str, str] | None) -> None:
        code = example.replace(PAGE_ADDRESS, cluster.gateway_address)
        assert code != example
        output = await output_of([sys.executable, "-c", code], variables)
        assert output.startswith(text), output

    await asyncio.gather(*(check(code, None) for code in own), *(check(code, environment) for code in others))


async def test_the_pages_examples_of_structured_output_run_as_they_stand(
    cluster: LocalCluster, triton_folder: Path
) -> None:
    """All but OpenAI's, which test_openai runs."""
    own, _, tritons = (
        example.replace(PAGE_ADDRESS, cluster.gateway_address)
        for example in blocks(PAGE, "Structured output", "python")
    )
    answers, triton_answer = await asyncio.gather(
        output_of([sys.executable, "-c", own]),
        output_of([sys.executable, "-c", tritons], triton_environment(triton_folder)),
    )
    person, date, choice, colours, refused = answers.splitlines()
    assert set(ast.literal_eval(person)) == {"name", "age", "likes"}
    assert re.fullmatch(r"regex [0-9]{4}-[01][0-9]-[0-3][0-9]", date)
    assert choice in ("choice yes", "choice no", "choice perhaps")
    assert re.fullmatch(r"grammar (red|green|blue)( and (red|green|blue))?", colours)
    assert refused == "sampling.response_format.regex"
    assert re.fullmatch(r"It is (red|green|blue)\.\n", triton_answer)


async def test_the_pages_commands_do_what_they_say(cluster: LocalCluster) -> None:
    lines = [
        line
        for section in ("Any language", "Health")
        for block in blocks(PAGE, section, "")
        for line in block.splitlines()
    ]
    assert len(lines) == 7
    commands = [shlex.split(line.replace(PAGE_ADDRESS, cluster.gateway_address)) for line in lines]
    outputs = await asyncio.gather(
        *(output_of([sys.executable, str(HERE / PROGRAMS[program]), *arguments]) for program, *arguments in commands)
    )
    assert "kvrelay.v1.InferenceService\n" in outputs[0]
    assert "kvrelay.v1.InferenceService.Generate\n" in outputs[1]
    assert "max_tokens 13\n" in outputs[2]
    assert '"finished"' in outputs[3]
    assert outputs[4:] == ["status: SERVING\n"] * 3
