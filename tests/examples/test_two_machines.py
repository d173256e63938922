"""The example "two_machines" on two hosts: network namespaces of this machine, joined by a cable of
their own.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay.testing.tiny_model import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

FOLDER = Path(__file__).parents[2] / "examples" / "two_machines"
EVERY_PROGRAM = "two_machines"
FIRST, SECOND = "10.213.7.1", "10.213.7.2"
TIMEOUT_S = 200.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other, and nothing else."""
    names = (f"kvrelay-a-{os.getpid()}", f"kvrelay-b-{os.getpid()}")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def environment(model: Path) -> dict[str, str]:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": binaries,
        "MODEL": str(model),
        "KVRELAY_KV_CACHE_MIB": "16",
        "KVRELAY_NUM_THREADS": "1",
    }


async def start(host: str, script: str, variables: dict[str, str]) -> asyncio.subprocess.Process:
    command = ("ip", "netns", "exec", host, str(FOLDER / script))
    return await asyncio.create_subprocess_exec(*command, env=variables, start_new_session=True)


async def stop(process: asyncio.subprocess.Process) -> None:
    """As Ctrl-C does: the whole group is told."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 2)
    try:
        async with asyncio.timeout(30):
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


async def in_host(host: str, *arguments: str, variables: dict[str, str]) -> tuple[int, str]:
    command = ("ip", "netns", "exec", host, sys.executable, "-m", "kvrelay.cli", *arguments)
    process = await asyncio.create_subprocess_exec(*command, env=variables, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_kv_goes_from_the_first_machine_to_the_second(hosts: tuple[str, str], tmp_path: Path) -> None:
    variables = environment(make_tiny_llama(tmp_path))
    first = await start(hosts[0], "first.sh", variables | {"ADDRESS": FIRST})
    second = await start(hosts[1], "second.sh", variables | {"ADDRESS": SECOND, "FIRST": FIRST})
    try:
        async with asyncio.timeout(TIMEOUT_S):
            # until both workers are there: a cluster of other processes tells nobody of itself
            while True:
                assert (first.returncode, second.returncode) == (None, None), "none has ended"
                code, status = await in_host(
                    hosts[0], "status", "--json", "--gateway", f"{FIRST}:50050", variables=variables
                )
                if code == 0 and sum(worker["connected"] for worker in json.loads(status)["workers"]) == 2:
                    break
            asked = ("complete", "Once upon a time there was a relay", "--max-tokens", "8", "--json")
            code, answer = await in_host(hosts[1], *asked, "--gateway", f"{FIRST}:50050", variables=variables)
    finally:
        await stop(second)
        await stop(first)
    assert code == 0
    finished = json.loads(answer.splitlines()[-1])
    phases = finished["finished"]["phases"] if "finished" in finished else finished["phases"]
    assert phases["transfer_transport"] == "grpc"
    assert phases["transfer_bytes"] > 0
