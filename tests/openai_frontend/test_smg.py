"""How smg is started, and which of its lines are shown."""

import asyncio
from pathlib import Path

import psutil
import pytest

from kvrelay.openai_frontend import smg
from kvrelay.runtime.child_process import ChildProcess


def test_smg_listens_on_loopback_only_and_what_guards_it_comes_after_the_users_arguments() -> None:
    command = smg.command(smg.SmgPorts(1, 2), ["a:3", "b:4"], 1000, ["--tool-call-parser", "llama"])
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--prometheus-host") + 1] == "127.0.0.1"
    assert command[command.index("--history-backend") + 1] == "none"
    position = command.index("--tool-call-parser")
    assert command[position + 1 :] == [
        "llama",
        "--max-payload-size",
        "6000",
        "--worker-urls",
        "grpc://a:3",
        "grpc://b:4",
    ]


async def test_smg_gets_its_key_where_no_other_user_sees_it(tmp_path: Path) -> None:
    (tmp_path / "smg").mkdir()
    (tmp_path / "smg/__init__.py").touch()
    (tmp_path / "smg/cli.py").write_text(
        "import signal\ndef main(arguments): print(arguments, flush=True); signal.pause()\n"
    )
    command = smg.command(smg.SmgPorts(1, 2), ["a:3"], 1000)
    said: asyncio.Queue[str] = asyncio.Queue()
    environment = {**smg.environment(), "PYTHONPATH": str(tmp_path)}
    child = ChildProcess(
        "smg", command, environment, lambda _, line: said.put_nowait(line), smg.secret_arguments("k3y")
    )
    await child.start()
    try:
        arguments = await asyncio.wait_for(said.get(), 60)
        command_line = psutil.Process(child.pid).cmdline()
    finally:
        await child.stop(5.0)
    assert arguments.endswith("'grpc://a:3', '--api-key', 'k3y']")
    assert "k3y" not in " ".join(command_line)


def test_the_banner_and_what_smg_says_at_each_start_are_not_shown() -> None:
    banner = "\u2800\u2800\u28c0\u28e4   version  1.13.0"
    posture = "WARN smg::posture: SECURITY POSTURE: this gateway runs without authentication"
    assert not any(map(smg.is_worth_showing, (banner, posture, "", "  ", "WARN libturbojpeg not found: JPEGs decode")))
    assert smg.is_worth_showing("ERROR smg::server: cannot reach grpc://127.0.0.1:50050")


def test_nothing_of_kvrelays_settings_reaches_smg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVRELAY_OPENAI_API_KEY", "secret")
    assert [name for name in smg.environment() if name.startswith("KVRELAY_")] == []
