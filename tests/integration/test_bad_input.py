"""Bad input gets its typed error with the field's name and what to do, before any block is
allocated; the service goes on.
"""

import asyncio
import math
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient
from kvrelay.errors import (
    InvalidRequestError,
    KvrelayError,
    ModelNotFoundError,
    NoChatTemplateError,
    RequestNotFoundError,
)
from kvrelay.network.rpc import create_channel
from kvrelay.v1 import inference_pb2, inference_pb2_grpc, session_pb2
from kvrelay.wire.errors import error_of_rpc
from tests.integration.clusters import assert_at_rest, cluster_of, engine, greedy, random_prompt
from tests.support.tiny_models import MAX_CONTEXT_TOKENS, VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

Request = inference_pb2.GenerateRequest
Sampling = session_pb2.SamplingParams
PROMPT = inference_pb2.TokenIds(ids=random_prompt(1, 10))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    folder = tmp_path_factory.mktemp("models")
    with_template = make_tiny_model("llama", folder)
    without_template = make_tiny_model("qwen3", folder)
    for file in without_template.glob("chat_template*"):
        file.unlink()
    prefill, decode = [engine(with_template)], [engine(with_template), engine(without_template)]
    async with cluster_of(prefill, decode, local_prefill_tokens=0) as cluster:
        yield cluster.gateway_address


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address) as client:
        yield client


def generate(**fields: Any) -> inference_pb2.GenerateRequest:
    return Request(**({"model": "llama"} | fields))


def sampled(**fields: Any) -> inference_pb2.GenerateRequest:
    return generate(token_ids=PROMPT, sampling=Sampling(**fields))


INVALID = [
    ("prompt", generate()),
    ("prompt.text", generate(text="")),
    ("prompt.token_ids", generate(token_ids=inference_pb2.TokenIds())),
    ("prompt.chat.messages", generate(chat=inference_pb2.ChatMessages())),
    ("prompt.token_ids[2]", generate(token_ids=inference_pb2.TokenIds(ids=[1, 2, VOCAB_SIZE]))),
    ("prompt", generate(token_ids=inference_pb2.TokenIds(ids=[9] * (MAX_CONTEXT_TOKENS + 1)))),
    ("prompt", generate(token_ids=inference_pb2.TokenIds(ids=[9] * MAX_CONTEXT_TOKENS))),
    ("sampling.max_tokens", sampled(max_tokens=0)),
    ("sampling.max_tokens", sampled(max_tokens=MAX_CONTEXT_TOKENS)),
    ("sampling.temperature", sampled(temperature=math.nan)),
    ("sampling.temperature", sampled(temperature=-1.0)),
    ("sampling.top_p", sampled(top_p=1.5)),
    ("sampling.n", sampled(n=9)),
    ("sampling.stop[1]", sampled(stop=[b"ok", b"\xff\xfe"])),
    ("sampling.stop[0]", sampled(stop=[b""])),
    ("sampling.stop_token_ids[0]", sampled(stop_token_ids=[VOCAB_SIZE])),
    ("sampling.logit_bias[4000]", sampled(logit_bias={4000: 1.0})),
    ("sampling.logprobs", sampled(logprobs=21)),
    ("sampling.min_tokens", sampled(min_tokens=9, max_tokens=8)),
    ("idempotency_key", generate(token_ids=PROMPT, idempotency_key="k" * 129)),
    ("tenant", generate(token_ids=PROMPT, tenant="t" * 129)),
]


async def refusal(address: str, request: inference_pb2.GenerateRequest) -> KvrelayError:
    """The error that Generate ends with, without a message before it."""
    async with create_channel(address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=30)
        with pytest.raises(Exception, match=r".") as failure:
            await call.read()
        return error_of_rpc(failure.value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "request_"), INVALID, ids=[f"{number} {field}" for number, (field, _) in enumerate(INVALID)]
)
async def test_a_wrong_field_is_refused_by_name(
    address: str, client: AsyncClient, field: str, request_: inference_pb2.GenerateRequest
) -> None:
    error = await refusal(address, request_)
    assert isinstance(error, InvalidRequestError)
    assert error.field == field
    assert len(error.problem) > 5
    await assert_at_rest(client)
    assert len((await greedy(client, random_prompt(2, 20), 4, model="llama")).outputs[0].tokens) == 4


async def test_an_unknown_model_is_not_found_and_the_answer_names_those_served(address: str) -> None:
    for model in ("nonesuch", ""):  # with two models served, none is the default
        error = await refusal(address, generate(model=model, token_ids=PROMPT))
        assert isinstance(error, ModelNotFoundError | InvalidRequestError)
        assert "llama" in error.message
        assert "qwen3" in error.message


async def test_chat_on_a_model_without_a_template_is_refused(address: str) -> None:
    chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    error = await refusal(address, generate(model="qwen3", chat=chat))
    assert isinstance(error, NoChatTemplateError)
    assert "text" in error.message


async def test_unknown_requests_are_not_found(client: AsyncClient) -> None:
    with pytest.raises(RequestNotFoundError):
        await client.get_request("0" * 32)
    with pytest.raises(RequestNotFoundError):
        await client.cancel("0" * 32)


async def run_serve(*arguments: str, timeout_s: float = 150) -> tuple[int, str]:
    """Exit code and standard error of `kvrelay serve ...`."""
    command = [sys.executable, "-m", "kvrelay.cli", "serve", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(timeout_s):
        _, output = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_broken_model_folder_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    exit_code, output = await run_serve("decode", "--model", str(model), "--redis-url", "redis://127.0.0.1:1/0")
    assert exit_code == 1
    assert str(model) in output
    assert "copy or convert" in output
    assert "Traceback" not in output


async def test_a_missing_model_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    exit_code, output = await run_serve(
        "prefill", "--model", str(tmp_path / "none"), "--redis-url", "redis://127.0.0.1:1/0"
    )
    assert exit_code == 1
    assert "none" in output
    assert "Traceback" not in output


async def test_an_unsupported_architecture_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    model = make_tiny_model("bloom", tmp_path)
    exit_code, output = await run_serve("decode", "--model", str(model), "--redis-url", "redis://127.0.0.1:1/0")
    assert exit_code == 1
    assert "bloom" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("role", ["gateway", "decode"])
async def test_a_taken_port_stops_the_start_with_a_sentence(role: str, tmp_path: Path) -> None:
    arguments = ["--model", str(make_tiny_model("llama", tmp_path))] if role == "decode" else []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        exit_code, output = await run_serve(
            role, *arguments, "--port", str(port), "--redis-url", "redis://127.0.0.1:1/0"
        )
    assert exit_code == 1
    assert str(port) in output
    assert "--port" in output
    assert "Traceback" not in output


async def test_a_pool_larger_than_the_memory_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    model = str(make_tiny_model("llama", tmp_path))
    arguments = ["--model", model, "--kv-cache-mib", str(2**30), "--redis-url", "redis://127.0.0.1:1/0"]
    exit_code, output = await run_serve("prefill", *arguments)
    assert exit_code == 2
    assert "--kv-cache-mib" in output
    assert "Traceback" not in output


async def test_an_unreachable_redis_at_start_is_said_and_survived(tmp_path: Path) -> None:
    """The gateway starts degraded: it answers, says so, and says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "kvrelay.cli",
        "serve",
        "gateway",
        "--port",
        str(port),
        "--redis-url",
        "redis://127.0.0.1:1/0",
    ]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stderr=output)
    try:
        async with asyncio.timeout(60), AsyncClient(f"127.0.0.1:{port}") as client:
            while True:
                try:
                    cluster = await client.cluster()
                    break
                except KvrelayError:
                    await asyncio.sleep(0.1)
        assert cluster.degraded
        assert "redis" in log.read_text().lower()
    finally:
        process.terminate()
        async with asyncio.timeout(40):
            assert await process.wait() == 0
    shutil.rmtree(tmp_path)
