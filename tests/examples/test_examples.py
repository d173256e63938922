"""Every example runs as it stands, against a cluster with the demo model and OpenAI's API."""

import ast
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.settings import OpenAISettings
from tests.integration.clusters import cluster_of, engine

pytestmark = [
    pytest.mark.integration,
    pytest.mark.real_model,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = {path.name for path in EXAMPLES.glob("*.py")}
FOLDERS = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
PAGE = (EXAMPLES / "README.md").read_text("utf-8")
TESTS = "\n".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
TIMEOUT_S = 240.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(smollm2_path: Path) -> AsyncIterator[LocalCluster]:
    settings = engine(smollm2_path, kv_cache_mib=128, served_model_name="smollm2-135m-instruct")
    cluster = cluster_of([settings], [settings], local_prefill_tokens=0)
    cluster.openai = OpenAISettings(port=0)
    async with cluster:
        yield cluster


async def output_of(*arguments: str, folder: Path, given: str = "") -> str:
    """Standard output of a Python program that must succeed; this checkout is the kvrelay that it
    imports.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, errors = await process.communicate(given.encode())
    except BaseException:
        process.kill()
        raise
    assert process.returncode == 0, f"{output.decode()}\n{errors.decode()}"
    return output.decode()


async def run(name: str, cluster: LocalCluster, folder: Path, given: str = "") -> str:
    return await output_of(str(EXAMPLES / name), "--gateway", cluster.gateway_address, folder=folder, given=given)


async def test_every_example_stands_in_the_list_and_has_a_test() -> None:
    assert len(PROGRAMS) >= 6
    assert [name for name in sorted(PROGRAMS | FOLDERS) if f"]({name}" not in PAGE or f'"{name}' not in TESTS] == []


async def test_a_chat_is_printed_with_where_its_time_went(cluster: LocalCluster, tmp_path: Path) -> None:
    output = await run("chat.py", cluster, tmp_path)
    assert "the prefill worker computed the prompt" in output
    assert "\n0 bytes of KV" not in output


async def test_a_conversation_computes_only_what_is_new(cluster: LocalCluster, tmp_path: Path) -> None:
    output = await run("conversation.py", cluster, tmp_path)
    cached = [int(line.split("(")[1].split()[0]) for line in output.splitlines() if "were there already" in line]
    assert len(cached) == 3
    assert cached[1] > 0 < cached[2]


async def test_a_batch_is_answered_in_order_and_a_bad_line_stops_nobody(cluster: LocalCluster, tmp_path: Path) -> None:
    prompts = ["The capital of France is", "word " * 12_000, "The capital of Italy is"]
    lines = [json.loads(line) for line in (await run("batch.py", cluster, tmp_path, "\n".join(prompts))).splitlines()]
    assert [line["prompt"] for line in lines] == [prompt.strip() for prompt in prompts]
    assert ["error" in line for line in lines] == [False, True, False]
    assert "Paris" in lines[0]["text"]


async def test_structured_output_is_the_model_that_was_asked_for(cluster: LocalCluster, tmp_path: Path) -> None:
    assert "minutes: " in await run("structured_output.py", cluster, tmp_path)


async def test_a_client_that_died_goes_on_with_every_token_once(cluster: LocalCluster, tmp_path: Path) -> None:
    output = await run("resume_after_a_crash.py", cluster, tmp_path)
    first, second = (ast.literal_eval(line.partition(": ")[2]) for line in output.splitlines())
    whole = await output_of(
        *("-c", WHOLE_ANSWER, cluster.gateway_address),
        folder=tmp_path,
    )
    assert "ended with 137" in output
    assert first
    assert second == ast.literal_eval(whole)
    assert second.startswith(first)


WHOLE_ANSWER = """
import sys
from kvrelay.client import Client
with Client(sys.argv[1]) as client:
    print(repr(client.complete("Once upon a time", max_tokens=48, temperature=0.8, seed=7).text))
"""


async def test_openais_own_client_gets_answers_streams_and_json(cluster: LocalCluster, tmp_path: Path) -> None:
    program = str(EXAMPLES / "openai_sdk.py")
    output = await output_of(program, "--url", f"http://{cluster.openai_address}/v1", folder=tmp_path)
    assert "answer: The capital of France is Paris" in output
    assert "\nstream: " in output
    assert "\nJSON: {'city': " in output


async def test_a_teams_own_test_passes(tmp_path: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "kvrelay.testing.pytest_plugin")
    output = await output_of("-m", "pytest", *options, str(EXAMPLES / "integration_test"), folder=tmp_path)
    assert "1 passed" in output
