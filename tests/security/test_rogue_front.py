"""A stranger at the OpenAI front and at the smg behind it: nothing of the control plane answers."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import psutil
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer

from kvrelay.network.listening import check_port
from kvrelay.openai_frontend import smg
from kvrelay.openai_frontend.front import OpenAIFront
from kvrelay.runtime.child_process import ChildProcess

KEY = "the-front-alone-knows-this"
MAX_BODY_BYTES = 100_000
CONTROL: tuple[tuple[str, str, object], ...] = (
    ("GET", "/workers", None),
    ("POST", "/workers", {"url": "grpc://127.0.0.1:9"}),
    ("DELETE", "/workers/01a22e6a-cdb0-71b7-8aad-656d2c4e582c", None),
    ("POST", "/v1/tokenizers", {"name": "x", "source": "/etc/passwd"}),
    ("GET", "/v1/tokenizers", None),
    ("POST", "/flush_cache", {}),
    ("GET", "/get_loads", None),
    ("POST", "/wasm", {"modules": [{"name": "x", "file_path": "/etc/passwd", "module_type": "Middleware"}]}),
    ("POST", "/v1/rl/pause", {}),
)


@dataclass
class Both:
    smg: str
    front: str
    pid: int
    session: aiohttp.ClientSession

    async def ask(self, base: str, method: str, path: str, body: object = None, key: str = "") -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.session.request(method, base + path, json=body, headers=headers) as answer:
            return answer.status, await answer.text()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def both() -> AsyncIterator[Both]:
    pytest.importorskip("smg")
    ports = smg.SmgPorts(check_port("127.0.0.1", 0, "a port"), check_port("127.0.0.1", 0, "a port"))
    command = smg.command(
        ports, [f"127.0.0.1:{check_port('127.0.0.1', 0, 'a port')}"], MAX_BODY_BYTES, ["--policy", "random"]
    )
    child = ChildProcess("smg", command, smg.environment(), lambda name, line: None, smg.secret_arguments(KEY))
    upstream = f"http://127.0.0.1:{ports.api}"
    front = TestServer(OpenAIFront(upstream, (), KEY, MAX_BODY_BYTES).application())
    await child.start()
    try:
        async with front, aiohttp.ClientSession() as session, asyncio.timeout(110):
            while not await _is_up(session, upstream):
                assert child.exit_code is None, list(child.tail)
                await asyncio.sleep(0.05)
            yield Both(upstream, str(front.make_url("")).rstrip("/"), child.pid, session)
    finally:
        await child.stop(5.0)


async def _is_up(session: aiohttp.ClientSession, upstream: str) -> bool:
    try:
        async with session.get(f"{upstream}/liveness") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("method", "path", "body"), CONTROL)
async def test_the_front_passes_nothing_of_the_control_plane_on(
    both: Both, method: str, path: str, body: object
) -> None:
    for key in ("", "guess", KEY):
        assert (await both.ask(both.front, method, path, body, key))[0] in (404, 405)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("method", "path", "body"), CONTROL)
async def test_smg_itself_wants_the_key_of_this_start(both: Both, method: str, path: str, body: object) -> None:
    for key in ("", "guess"):
        assert (await both.ask(both.smg, method, path, body, key))[0] in (401, 404)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_key_is_what_opens_the_control_plane_and_no_worker_was_added(both: Both) -> None:
    status, text = await both.ask(both.smg, "GET", "/workers", key=KEY)
    assert status == 200
    assert "127.0.0.1:9/" not in text
    assert '127.0.0.1:9"' not in text


@pytest.mark.asyncio(loop_scope="module")
async def test_chats_go_to_smg_only_with_the_key_too(both: Both) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert (await both.ask(both.smg, "POST", "/v1/chat/completions", body))[0] == 401
    # Past the key: there is no gateway here.
    assert (await both.ask(both.front, "POST", "/v1/chat/completions", body))[0] in (404, 503)


@pytest.mark.asyncio(loop_scope="module")
async def test_long_bodies_cost_neither_process_memory(both: Both) -> None:
    process = psutil.Process(both.pid)
    before = process.memory_info().rss
    for _ in range(4):
        assert await _status_of_long_body(both.session, both.front, {}) in (413, None)
        assert await _status_of_long_body(both.session, both.smg, {"Authorization": f"Bearer {KEY}"}) in (413, None)
    assert process.memory_info().rss - before < 32 << 20


async def _status_of_long_body(session: aiohttp.ClientSession, base: str, headers: dict[str, str]) -> int | None:
    """None where the server hung up while the body was sent."""
    try:
        async with session.post(f"{base}/v1/completions", data=io.BytesIO(b"a" * (8 << 20)), headers=headers) as answer:
            return answer.status
    except aiohttp.ClientError:
        return None


@pytest.mark.asyncio(loop_scope="module")
async def test_the_ports_are_on_loopback_only_and_the_key_is_in_no_command_line(both: Both) -> None:
    process = psutil.Process(both.pid)
    listening = [each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) == {"127.0.0.1"}
    assert KEY not in " ".join(process.cmdline())
