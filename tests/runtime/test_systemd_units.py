"""deploy/systemd: units that systemd accepts, with options that kvrelay has, whose process says
that it is ready.
"""

import asyncio
import configparser
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvrelay.config.base import Settings
from kvrelay.config.settings import DecodeSettings, GatewaySettings, PrefillSettings, ServerSettings
from kvrelay.config.sources import SECTIONS, setting_fields
from kvrelay.runtime.watchdog import ALIVE, SEND_INTERVAL_S
from kvrelay.state.embedded_valkey import EmbeddedValkey
from tests.support import left_out

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNITS = sorted(FOLDER.glob("*.service"))
ROLES: dict[str, type[Settings]] = {"gateway": GatewaySettings, "prefill": PrefillSettings, "decode": DecodeSettings}
WORDS_AROUND = ("/bin/sh", "-c")
START_TIMEOUT_S = 60.0


def section(unit: Path, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names of systemd have capitals
    parser.read(unit)
    return dict(parser[name])


def shell_command(unit: Path) -> str:
    """What systemd gives to the shell: `$$` is its way to write `$`."""
    shell, option, quoted = section(unit, "Service")["ExecStart"].split(" ", 2)
    assert (shell, option) == WORDS_AROUND
    return quoted.strip("'").replace("$$", "$")


def test_there_is_a_unit_for_each_role() -> None:
    assert [unit.stem for unit in UNITS] == sorted(f"kvrelay-{role}" for role in ROLES)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason=left_out.not_for("systems without systemd"))
def test_systemd_accepts_the_units() -> None:
    command = ["systemd-analyze", "verify", "--man=no", *map(str, UNITS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    ours = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "kvrelay" in line and "is not executable" not in line
    ]
    assert ours == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_units_options_are_kvrelays_and_its_times_are_longer_than_those_of_the_process(unit: Path) -> None:
    words = shell_command(unit).split()
    role = words[words.index("serve") + 1]
    assert unit.stem == f"kvrelay-{role}"
    flags = {word for word in words if word.startswith("--")}
    known = {field.flag for field in setting_fields(ROLES[role]).values()} | {"--config"}
    assert flags == {"--config", "--watchdog-socket"}
    assert flags <= known
    service = section(unit, "Service")
    assert float(service["TimeoutStopSec"]) > ServerSettings().drain_timeout_ms / 1000
    assert float(service["WatchdogSec"]) > 5 * SEND_INTERVAL_S


def test_keys_of_the_example_file_are_settings() -> None:
    content = yaml.safe_load((FOLDER / "kvrelay.yaml").read_text("utf-8"))
    sections = {name: content.pop(name) for name in SECTIONS if name in content}
    known = {name: setting_fields(settings) for name, settings in SECTIONS.items()}
    assert set(content) <= set.union(*(set(fields) for fields in known.values()))
    assert [name for name, keys in sections.items() if not set(keys) <= set(known[name])] == []


async def test_the_command_of_a_unit_tells_systemd_that_it_is_ready(tmp_path: Path) -> None:
    (unit,) = (unit for unit in UNITS if unit.stem == "kvrelay-gateway")
    command = shell_command(unit).replace("/opt/kvrelay/bin/kvrelay", f"{sys.executable} -m kvrelay.cli")
    command = command.replace("/etc/kvrelay/kvrelay.yaml", str(tmp_path / "kvrelay.yaml"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        async with EmbeddedValkey() as valkey:
            (tmp_path / "kvrelay.yaml").write_text(yaml.safe_dump({"redis_url": valkey.url, "gateway": {"port": 0}}))
            environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
            process = await asyncio.create_subprocess_exec(*WORDS_AROUND, command, env=environment)
            said = asyncio.create_task(asyncio.get_running_loop().sock_recv(systemd, 4096))
            ended = asyncio.create_task(process.wait())
            try:
                await asyncio.wait([said, ended], timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                assert said.done(), f"nothing was said; the process ended with {process.returncode}"
                process.terminate()
                assert (said.result(), await ended) == (ALIVE, 0)
            finally:
                said.cancel()
                if process.returncode is None:
                    process.kill()
                await ended
