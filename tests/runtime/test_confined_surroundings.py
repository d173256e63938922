"""Confined children where containers run them: another user, no writable folder, few processes.

What cannot be started is a typed error, and the process lives on.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import left_out

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason=left_out.not_for("users who cannot become another"))

ROOT = Path(__file__).resolve().parents[2]
OTHER_USER = 61_000 + os.getpid() % 4_000
"""Runs nothing else: limits of processes count all of a user's."""
# The other user may not read this installation, so it keeps the right to read, and no other.
AS_OTHER_USER = (
    *("setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups", "--no-new-privs"),
    *(
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
    ),
)
OWN_MOUNTS = ("unshare", "--mount", "--propagation=private")
WITHOUT_WRITABLE_FOLDERS = (*OWN_MOUNTS, "sh", "-c", 'mount -o remount,ro,bind / && exec "$@"', "sh")

COMMON = """
import asyncio, json, os, resource, sys
from gateway.text.chat_renderer import ChatRenderer
from gateway.text.template_source import TemplateSource
from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import KvrelayError
from kvrelay.structured_output.format_checks import FormatChecks

TEMPLATE = TemplateSource("{{ messages[0].content }}")
numbers = iter(range(10**6))

async def render(renderer):
    chat = [{"role": "user", "content": "Hello"}]
    return await renderer.render(TEMPLATE, chat, "messages", asyncio.get_running_loop().time() + 120)

async def check(checks):
    return await checks.check(ResponseFormat.regex(f"yes|no{next(numbers)}")) > 0

async def outcome(work):
    try:
        return await work
    except KvrelayError as error:
        return f"{type(error).__name__}: {error.message}"
"""

IN_USE = """
async def main():
    renderer, checks = ChatRenderer(), FormatChecks()
    told = {"user": os.geteuid(), "chat": await outcome(render(renderer)), "format": await outcome(check(checks))}
    try:
        open("written", "w").close()
        told["writes"] = True
    except OSError:
        told["writes"] = False
    await renderer.close()
    await checks.close()
    print(json.dumps(told))
asyncio.run(main())
"""

FEW_PROCESSES = """
def allow(number):
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard if number is None else number, hard))

async def main():
    told = {"limited": [], "after": []}
    num_own = len(os.listdir("/proc/self/task"))
    for more in range(5):
        renderer, checks = ChatRenderer(), FormatChecks()
        allow(num_own + more)
        told["limited"].append([await outcome(render(renderer)), await outcome(check(checks))])
        allow(None)
        told["after"].append([await outcome(render(renderer)), await outcome(check(checks))])
        await renderer.close()
        await checks.close()
    told["threads"] = len(os.listdir("/proc/self/task")) - num_own
    print(json.dumps(told))
asyncio.run(main())
"""


async def told_by(program: str, *before: str) -> Any:
    command = (*before, *AS_OTHER_USER, sys.executable, "-c", COMMON + program)
    ran = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


async def test_children_work_under_another_user() -> None:
    told = await told_by(IN_USE)
    assert told == {"user": OTHER_USER, "chat": "Hello", "format": True, "writes": False}


async def test_children_work_without_a_writable_folder() -> None:
    mounted = await asyncio.to_thread(subprocess.run, [*OWN_MOUNTS, "true"], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(left_out.not_for("places where root makes no mount namespace"))
    told = await told_by(IN_USE, *WITHOUT_WRITABLE_FOLDERS)
    assert told == {"user": OTHER_USER, "chat": "Hello", "format": True, "writes": False}


async def test_where_the_limit_of_processes_is_reached_requests_are_told_and_the_process_lives_on() -> None:
    told = await told_by(FEW_PROCESSES)
    assert told["after"] == [["Hello", True]] * 5, "once more are allowed, all is as before"
    problems = [each for pair in told["limited"] for each in pair]
    refused = [each for each in problems if each not in ("Hello", True)]
    assert told["limited"][0] == refused[:2], "not a single process more is allowed"
    for problem in refused:
        assert problem.startswith("UnavailableError: "), problem
        assert "try again later, or tell the operator" in problem
    assert told["threads"] == 0, "no thread waits for a child"
