"""Commands as a user types them, against a scripted gateway: what they print, where, and how they
exit.
"""

import asyncio
import io
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvrelay import errors
from kvrelay.cli import main
from kvrelay.network.exposure import CREDENTIALS_NAME, INSECURE_NAME
from kvrelay.v1 import inference_pb2, session_pb2
from tests.cli.terminal import Terminal
from tests.support.fake_inference_service import (
    REQUEST_ID,
    Behaviour,
    FakeInferenceService,
    accepted,
    delta,
    finished,
    play,
    start_fake,
    then_break,
    then_raise,
    then_wait,
)

WHOLE = (accepted(), delta(0, "Hello"), delta(1, " there", last=True), finished(num_tokens=2))


@dataclass(frozen=True)
class Result:
    exit_code: int
    out: str
    err: str


Run = Callable[..., Coroutine[Any, Any, Result]]


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeInferenceService]:
    service = FakeInferenceService()
    bound, address = await start_fake(service)
    monkeypatch.setenv("KVRELAY_GATEWAY", address)
    yield service
    await bound.server.stop(None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(arguments: tuple[str, ...]) -> int:
        try:
            main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    async def run(*arguments: str, stdin: str | bytes = "") -> Result:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode()))
        )
        exit_code = await asyncio.to_thread(call, arguments)
        captured = capsys.readouterr()
        return Result(exit_code, captured.out, captured.err)

    return run


async def begin_complete(service: FakeInferenceService, behaviour: Behaviour) -> asyncio.subprocess.Process:
    """`kvrelay complete` as a process of its own, of which the first text was read."""
    service.unary["CancelRequest"] = inference_pb2.CancelRequestResponse(state=inference_pb2.REQUEST_STATE_CANCELLED)
    service.generate = [behaviour]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvrelay.cli",
        "complete",
        "x",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.read(5), 60) == b"Hello"
    return process


def cancelled_ids(service: FakeInferenceService) -> list[str]:
    return [call.request_id for call in service.calls if isinstance(call, inference_pb2.CancelRequestRequest)]


async def test_ctrl_c_cancels_the_request(service: FakeInferenceService) -> None:
    process = await begin_complete(service, then_wait(*WHOLE[:2]))
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, err) == (130, b"")
    assert cancelled_ids(service) == [REQUEST_ID]


async def test_a_request_whose_reader_goes_away_is_cancelled(service: FakeInferenceService) -> None:
    more = asyncio.Event()

    async def behaviour(request: object, context: object) -> AsyncIterator[object]:
        for event in WHOLE[:2]:
            yield event
        await more.wait()
        for index in range(1, 100):
            yield delta(index, " text")
        await asyncio.Event().wait()

    process = await begin_complete(service, behaviour)
    transport: Any = process._transport  # type: ignore[attr-defined]  # asyncio offers no way to close one pipe only
    transport.get_pipe_transport(1).close()
    more.set()
    await asyncio.wait_for(process.wait(), 60)
    assert process.stderr is not None
    assert await process.stderr.read() == b""
    assert process.returncode == 1
    assert cancelled_ids(service) == [REQUEST_ID]


async def test_complete_prints_the_text_and_nothing_else(service: FakeInferenceService, run: Run) -> None:
    service.generate = [play(*WHOLE)]
    result = await run(
        "complete", "Say hello", "--max-tokens", "2", "--temperature", "0", "--stop", "a", "--stop", "b", "--seed", "3"
    )
    assert result == Result(0, "Hello there\n", "")
    (request,) = service.calls
    assert request.text == "Say hello"
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (2, 0, 3)
    assert list(request.sampling.stop) == [b"a", b"b"]


async def test_complete_takes_every_sampling_parameter(service: FakeInferenceService, run: Run) -> None:
    service.generate = [play(*WHOLE)]
    options = {
        "--temperature": "0.5",
        "--top-k": "5",
        "--top-p": "0.5",
        "--min-p": "0.25",
        "--repetition-penalty": "1.5",
        "--presence-penalty": "0.5",
        "--frequency-penalty": "-0.5",
        "--logit-bias": '{"7": -1.5}',
        "--stop-token": "9",
        "--min-tokens": "1",
        "--logprobs": "2",
        "--n": "1",
    }
    result = await run("complete", "x", "--ignore-eos", *(part for pair in options.items() for part in pair))
    assert result.exit_code == 0
    expected = session_pb2.SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={7: -1.5},
        stop_token_ids=[9],
        min_tokens=1,
        ignore_eos=True,
        logprobs=2,
        n=1,
    )
    assert service.calls[0].sampling == expected


async def test_complete_reads_a_prompt_from_standard_input_and_sends_it_as_chat(
    service: FakeInferenceService, run: Run
) -> None:
    service.generate = [play(*WHOLE)]
    await run("complete", "-", "--chat", "--system", "Be brief.", stdin="What is it?")
    sent = [(message.role, message.content) for message in service.calls[0].chat.messages]
    assert sent == [("system", "Be brief."), ("user", "What is it?")]


async def test_complete_as_json_is_one_object_per_event(service: FakeInferenceService, run: Run) -> None:
    service.generate = [play(*WHOLE)]
    result = await run("complete", "x", "--json")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [next(iter(event)) for event in events] == ["accepted", "delta", "delta", "finished"]
    assert events[0]["accepted"]["request_id"] == REQUEST_ID
    assert events[2]["delta"]["finish_reason"] == "length"
    assert events[3]["finished"]["phases"]["transfer_bytes"] == 4096


async def test_several_answers_are_shown_apart(service: FakeInferenceService, run: Run) -> None:
    service.generate = [
        play(
            accepted(),
            delta(0, "one", last=True),
            delta(0, "two", sequence=1, last=True),
            finished(num_sequences=2, num_tokens=2),
        )
    ]
    result = await run("complete", "x", "--n", "2")
    assert result.out == "one\n--- answer 2:\ntwo\n"


async def test_phases_are_shown_on_standard_error(service: FakeInferenceService, run: Run) -> None:
    service.generate = [play(*WHOLE)]
    result = await run("complete", "x", "--phases")
    assert result.out == "Hello there\n"
    for word in (
        "queue",
        "prefill",
        "transfer",
        "4,096 bytes",
        "GB/s",
        "exposed",
        "handoff gap",
        "decode",
        "first token",
        "tokens/s",
    ):
        assert word in result.err


async def test_a_broken_connection_is_not_noticed(service: FakeInferenceService, run: Run) -> None:
    service.generate = [then_break(accepted(), delta(0, "Hello"))]
    service.resume = [play(*WHOLE)]
    assert (await run("complete", "x")).out == "Hello there\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.InvalidRequestError("max_tokens", "is 0"), "error: max_tokens is 0\n"),
        (
            errors.ModelNotFoundError("no model x"),
            "error: no model x. See the models that are served with `kvrelay status`.\n",
        ),
        (errors.OverloadedError("too many requests"), "error: too many requests. Try again later.\n"),
        (
            errors.RequestNotFoundError("no request x"),
            "error: no request x. See known requests with `kvrelay requests`.\n",
        ),
    ],
)
async def test_an_error_is_one_line_that_says_what_to_do(
    service: FakeInferenceService, run: Run, error: errors.KvrelayError, expected: str
) -> None:
    service.generate = [then_raise(error)]
    assert await run("complete", "x") == Result(1, "", expected)


async def test_an_unreachable_gateway_is_one_line(run: Run) -> None:
    result = await run("complete", "x", "--gateway", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.err.startswith("error: cannot reach a gateway at 127.0.0.1:1: ")
    assert result.err.count("\n") == 1


async def test_a_wrong_setting_is_a_usage_error(run: Run) -> None:
    result = await run("serve", "gateway", "--port", "99999")
    assert (result.exit_code, result.out) == (2, "")
    assert "port is '99999' (flag --port)" in result.err
    assert (await run("serve", "gateway", "--prot", "1")).exit_code == 2


async def test_resume_begins_at_an_index(service: FakeInferenceService, run: Run) -> None:
    service.resume = [play(accepted(), delta(1, " there", last=True), finished())]
    assert (await run("resume", REQUEST_ID, "--from-index", "1")).out == " there\n"
    assert service.calls[0].from_index == 1


async def test_chat_answers_every_line_of_a_pipe_until_exit(service: FakeInferenceService, run: Run) -> None:
    async def echo(request: Any, context: Any) -> AsyncIterator[Any]:
        yield accepted()
        yield delta(0, request.messages[-1].content.upper(), last=True)
        yield finished()

    service.converse = echo
    result = await run("chat", "--system", "Be loud.", "--max-tokens", "4", stdin="one\n\ntwo\n/exit\nthree\n")
    assert result == Result(0, "ONE\nTWO\n", "")
    assert [[message.role for message in call.messages] for call in service.calls] == [["system", "user"], ["user"]]
    assert service.calls[1].sampling.max_tokens == 4


async def test_chat_takes_commands_and_long_messages_from_a_pipe(service: FakeInferenceService, run: Run) -> None:
    service.converse = play(accepted(), delta(0, "Yes.", last=True), finished())
    lines = ('"""', "one", "two", '"""', "/system Be brief.", "//three", "/four")
    result = await run("chat", stdin="\n".join(lines))
    assert (result.exit_code, result.out) == (1, "Yes.\nYes.\n")
    assert "error: message /four is no command" in result.err
    sent = [[message.content for message in call.messages] for call in service.calls]
    assert sent == [["one\ntwo"], ["Be brief.", "one\ntwo", "Yes.", "/three"]]


@pytest.mark.parametrize("arguments", [(), ("-",)])
@pytest.mark.parametrize(("piped", "sent"), [("What is it?", "What is it?"), ("a\nb\r\n", "a\nb"), ("a\n\n", "a\n")])
async def test_a_prompt_is_read_from_a_pipe_without_its_last_line_end(
    service: FakeInferenceService, run: Run, arguments: tuple[str, ...], piped: str, sent: str
) -> None:
    service.generate = [play(*WHOLE)]
    service.unary["Tokenize"] = inference_pb2.TokenizeResponse(token_ids=[1, 22])
    assert (await run("complete", *arguments, stdin=piped)).out == "Hello there\n"
    assert (await run("tokenize", *arguments, stdin=piped)).out == "1 22\n"
    assert [call.text for call in service.calls] == [sent, sent]


@pytest.mark.parametrize(
    ("piped", "problem"),
    [
        (b"", "is empty: nothing came through standard input"),
        (b"\n", "is empty"),
        (b"a\xff", "is no UTF-8 text: its byte 1 is 0xff"),
        (b"a" * (8 * 1024 * 1024 + 1), "is longer than 8 MiB"),
    ],
)
@pytest.mark.parametrize(("command", "field"), [("complete", "prompt"), ("tokenize", "text")])
async def test_what_comes_through_a_pipe_and_is_no_prompt_is_not_sent(
    service: FakeInferenceService, run: Run, command: str, field: str, piped: bytes, problem: str
) -> None:
    result = await run(command, stdin=piped)
    assert (result.exit_code, result.out) == (1, "")
    assert f"error: {field} {problem}" in result.err
    assert service.calls == []


def test_a_prompt_that_is_missing_at_a_terminal_is_asked_for() -> None:
    with Terminal(["-m", "kvrelay.cli", "complete"]) as terminal:
        assert terminal.wait() == 1
    assert terminal.shown == b"error: prompt is missing: give it as an argument, or through a pipe\r\n"


async def test_chat_refuses_several_answers(service: FakeInferenceService, run: Run) -> None:
    result = await run("chat", "--n", "2")
    assert (result.exit_code, result.err) == (
        1,
        "error: n must be 1 in a chat: one answer continues the conversation\n",
    )


def cluster(*, degraded: bool = False) -> inference_pb2.GetClusterResponse:
    worker = inference_pb2.WorkerInfo(
        worker_id="decode-0123456789abcdef",
        role=inference_pb2.WORKER_ROLE_DECODE,
        address="127.0.0.1:4242",
        model=session_pb2.ModelInfo(name="tiny[bold]", dtype="float32"),
        load=session_pb2.WorkerLoad(num_running=3, num_used_blocks=12, num_blocks=40),
        connected=True,
    )
    health = inference_pb2.STATE_STORE_HEALTH_DEGRADED if degraded else inference_pb2.STATE_STORE_HEALTH_OK
    running = inference_pb2.RequestInfo(request_id=REQUEST_ID, state=inference_pb2.REQUEST_STATE_DECODING)
    return inference_pb2.GetClusterResponse(workers=[worker], state_store=health, running_requests=[running])


async def test_status_shows_workers_blocks_and_running_requests(service: FakeInferenceService, run: Run) -> None:
    service.unary["GetCluster"] = cluster(degraded=True)
    result = await run("status")
    assert result.exit_code == 0
    for text in (
        "decode-012345678",
        "127.0.0.1:4242",
        "tiny[bold] (float32)",
        "connected",
        "12 of 40",
        REQUEST_ID,
        "decoding",
        "degraded",
    ):
        assert text in result.out
    as_json = json.loads((await run("status", "--json")).out)
    assert as_json["workers"][0]["load"]["num_used_blocks"] == 12


async def test_requests_lists_them(service: FakeInferenceService, run: Run) -> None:
    failed = inference_pb2.REQUEST_STATE_FAILED
    request = inference_pb2.RequestInfo(request_id=REQUEST_ID, state=failed, error_message="out of luck")
    service.unary["ListRequests"] = inference_pb2.ListRequestsResponse(requests=[request])
    result = await run("requests", "--active", "--limit", "7")
    assert REQUEST_ID in result.out
    assert "out of luck" in result.out
    assert (service.calls[0].active_only, service.calls[0].page_size) == (True, 7)
    assert json.loads((await run("requests", "--json")).out)["state"] == "failed"


async def test_health_exits_with_what_it_found(service: FakeInferenceService, run: Run) -> None:
    service.unary["GetCluster"] = cluster()
    assert (await run("health")).exit_code == 0
    service.unary["GetCluster"] = cluster(degraded=True)
    degraded = await run("health")
    assert degraded.exit_code == 2
    assert "Redis does not answer" in degraded.out
    assert (await run("health", "--allow-degraded")).exit_code == 0
    assert (await run("health", "--address", "127.0.0.1:1")).exit_code == 1


async def test_health_of_a_worker_needs_no_cluster(service: FakeInferenceService, run: Run) -> None:
    service.unary["GetCluster"] = errors.UnsupportedError("not offered")
    assert (await run("health", "--json")).exit_code == 0


async def test_health_shows_what_an_operator_must_mend(
    service: FakeInferenceService, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.unary["GetCluster"] = cluster()
    bound, address = await start_fake(service)
    monkeypatch.setenv("KVRELAY_GATEWAY", address)
    healthy = await run("health", "--json")
    await bound.set_serving(True, INSECURE_NAME)
    await bound.set_serving(False, CREDENTIALS_NAME)
    text, values = await run("health"), await run("health", "--json")
    await bound.server.stop(None)
    assert "--insecure" in text.err
    assert "keys or certificates cannot be used" in text.err
    assert text.exit_code == 0
    told = {"insecure", "broken_credentials"}
    assert {name for name in told if json.loads(values.out).get(name) is True} == told
    assert not told & set(json.loads(healthy.out))


async def test_small_commands(service: FakeInferenceService, run: Run) -> None:
    service.unary = {
        "CancelRequest": inference_pb2.CancelRequestResponse(state=inference_pb2.REQUEST_STATE_CANCELLED),
        "Tokenize": inference_pb2.TokenizeResponse(token_ids=[1, 22]),
        "Detokenize": inference_pb2.DetokenizeResponse(text="hi"),
    }
    assert (await run("cancel", REQUEST_ID)).out == f"{REQUEST_ID} cancelled\n"
    assert (await run("tokenize", "hi")).out == "1 22\n"
    assert (await run("detokenize", "1", "22")).out == "hi\n"
    assert (await run("version")).out.strip()


async def test_models_lists_adds_and_finds(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    store = ("--model-dir", str(tmp_path / "store"))
    added = await run("models", "add", "tiny", str(tiny_model), *store)
    assert (added.exit_code, added.err) == (0, "")
    assert (await run("models", "path", "tiny", *store)).out == added.out
    assert json.loads((await run("models", "list", "--json", *store)).out)["name"] == "tiny"
    assert "tiny" in (await run("models", *store)).out
    assert (await run("models", "remove", "tiny", *store)).exit_code == 0
    missing = await run("models", "remove", "tiny", *store)
    assert missing.exit_code == 1
    assert missing.err.startswith("error: no model 'tiny'")


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_command_line_starts_without_torch_and_grpc() -> None:
    heavy = ("torch", "transformers", "numpy", "grpc", "redis")
    code = f"import sys, kvrelay.cli.app; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    "command", [("serve", "all"), ("complete",), ("chat",), ("status",), ("demo",), ("models", "add")]
)
async def test_help_shows_the_options_in_full_on_a_small_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = await run(*command, "--help")
    assert result.exit_code == 0
    assert "--" in result.out
    assert "…" not in result.out


_SERVE_A_FAKE_GATEWAY = """
import atexit, sys, time, types
def run(settings):
    atexit.register(time.sleep, 600)
    print('it ran')
sys.modules["gateway.main"] = types.SimpleNamespace(run=run)
from kvrelay.cli import main
main(["serve", "gateway"])
"""


def test_a_role_that_has_ended_does_not_wait_for_its_libraries() -> None:
    environment = {"PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", _SERVE_A_FAKE_GATEWAY]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert (result.returncode, result.stdout) == (0, "it ran\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m kvrelay.cli serve all --help | head -c 10; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert "Broken pipe" not in result.stderr


def test_a_worker_without_its_libraries_says_what_to_install(tmp_path: Path) -> None:
    # A folder without prefill_worker's libraries: torch is hidden.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    command = [sys.executable, "-m", "kvrelay.cli", "serve", "prefill", "--redis-url", "redis://127.0.0.1:1/0"]
    environment = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert result.returncode == 1
    assert "pip install '.[worker]'" in result.stderr
    assert "Traceback" not in result.stderr
