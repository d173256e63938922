"""The chat of tools/newcomer.sh: it notices answers, none, and a chat that does not end well."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_inference_service import FakeInferenceService, accepted, delta, finished, start_fake

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("answer", "exit_code"), [("It is Paris.", 0), ("", 1)], ids=["an answer", "no answer"])
async def test_a_chat_is_asked_twice_and_left(answer: str, exit_code: int) -> None:
    asked = []

    async def converse(request: Any, context: Any) -> AsyncIterator[Any]:
        asked.append(request.messages[-1].content)
        yield accepted()
        yield delta(0, answer, last=True)
        yield finished()

    service = FakeInferenceService()
    service.converse = converse
    bound, address = await start_fake(service)
    program = [sys.executable, "-m", "tools.scripted_chat", str(Path(sys.executable).with_name("kvrelay")), "chat"]
    environment = {**os.environ, "KVRELAY_GATEWAY": address}
    process = await asyncio.create_subprocess_exec(*program, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(100):
        said, _ = await process.communicate()
    await bound.server.stop(None)
    assert (process.returncode, asked[0]) == (exit_code, "What is the capital of France?")
    if answer:
        assert len(asked) == 2
        assert said.decode().count(answer) == 2
