"""The front before smg, with a server in smg's place: keys, paths, bounds, what is passed on, and
clients that hang up.
"""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from kvrelay.config.security_settings import SecuritySettings
from kvrelay.network.http_bounds import HostNames
from kvrelay.openai_frontend import front as front_module
from kvrelay.openai_frontend.front import OpenAIFront
from kvrelay.openai_frontend.open_requests import FRONT_ITSELF, Client
from kvrelay.security.guard import Guard
from kvrelay.security.keys import digest_of, new_key
from kvrelay.security.method_rules import HTTP_RULES
from kvrelay.security.principal import Principal, Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.testing.waiting import wait_until
from tests.security.test_guard import Tokens

KEYS = ("first", "second")
MAX_BODY_BYTES = 1_000_000
BEARER = {"Authorization": "Bearer second"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
EVENT = {
    "choices": [
        {"delta": {"content": "\U0001f600"}, "logprobs": {"content": [{"token": "\ufffd", "bytes": [239, 191, 189]}]}}
    ]
}


@dataclass
class FakeSmg:
    """Notes what it is asked."""

    asked: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    clients: list[Client | None] = field(default_factory=list)
    """Whose requests they are, as the relay finds it."""
    client_of: Callable[[str], Client | None] = lambda request_id: None
    url: str = ""
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    ready: bool = True

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs))
        self.keys.append(request.headers.get("Authorization"))
        self.request_ids.append(request.headers.get("X-Request-Id", ""))
        self.clients.append(self.client_of(self.request_ids[-1] + "-0198f"))
        if request.path in ("/v1/models", "/v1/tokenizers"):
            return web.json_response({"data": [1] * self.ready, "tokenizers": [1] * self.ready})
        if request.method != "POST":
            return web.json_response({"path": request.path})
        self.bodies.append(body := await request.json())
        if body.get("user") == "hold":
            await self._hold()
        if not body.get("stream"):
            return web.json_response({"choices": []}, status=418 if body.get("user") == "teapot" else 200)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        data = b"data: " + json.dumps(EVENT).encode() + b"\n\ndata: [DONE]\n\n"
        for position in range(0, len(data), 7):  # events come in pieces
            await response.write(data[position : position + 7])
        return response

    async def _hold(self) -> None:
        self.holding.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


@dataclass
class Both:
    smg: FakeSmg
    client: TestClient[web.Request, web.Application]

    async def post(self, path: str, body: Any, **arguments: Any) -> tuple[int, str]:
        async with self.client.post(f"/v1/{path}", json=body, **({"headers": BEARER} | arguments)) as answer:
            return answer.status, await answer.text()


@pytest_asyncio.fixture
async def both() -> AsyncIterator[Both]:
    smg = FakeSmg()
    upstream = web.Application()
    upstream.router.add_route("*", "/{path:.*}", smg.answer)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(TestServer(upstream, handler_cancellation=True))
        smg.url = str(server.make_url("")).rstrip("/")
        front = OpenAIFront(smg.url, KEYS, "inner", MAX_BODY_BYTES)
        client = await stack.enter_async_context(TestClient(TestServer(front.application(), handler_cancellation=True)))
        yield Both(smg, client)


def error_of(text: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer third"}, {"Authorization": "Basic second"}, {"X-Api-Key": "first"}]
)
async def test_a_client_without_a_key_gets_nothing_past(both: Both, headers: dict[str, str]) -> None:
    status, text = await both.post("chat/completions", CHAT, headers=headers)
    assert (status, error_of(text)["code"]) == (401, "invalid_api_key")
    assert both.smg.asked == []


async def test_each_key_opens_and_smg_gets_its_own(both: Both) -> None:
    for key in KEYS:
        assert (await both.post("chat/completions", CHAT, headers={"Authorization": f"Bearer {key}"}))[0] == 200
    assert both.smg.keys == ["Bearer inner"] * 2
    assert both.smg.bodies == [CHAT] * 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/workers"),
        ("GET", "/workers"),
        ("POST", "/heap_profile"),
        ("POST", "/flush_cache"),
        ("GET", "/v1/tokenizers"),
    ],
)
async def test_the_control_plane_of_smg_is_out_of_reach(both: Both, method: str, path: str) -> None:
    async with both.client.request(method, path, headers=BEARER) as answer:
        assert (answer.status, error_of(await answer.text())["code"]) == (404, "unknown_url")
    assert both.smg.asked == []


async def test_models_and_responses_are_passed_on_with_their_query(both: Both) -> None:
    for method, path in (
        ("GET", "/v1/models/m"),
        ("GET", "/v1/responses/r?stream=false"),
        ("DELETE", "/v1/responses/r"),
    ):
        async with both.client.request(method, path, headers=BEARER) as answer:
            assert answer.status == 200
    assert both.smg.asked == [
        ("GET", "/v1/models/m"),
        ("GET", "/v1/responses/r?stream=false"),
        ("DELETE", "/v1/responses/r"),
    ]


async def test_a_refused_field_is_named_and_nothing_is_asked(both: Both) -> None:
    status, text = await both.post("completions", {"prompt": "x", "suffix": "y"})
    assert (status, error_of(text)["param"]) == (400, "suffix")
    assert both.smg.asked == []


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_refused(both: Both, data: bytes) -> None:
    async with both.client.post("/v1/completions", data=data, headers=BEARER) as answer:
        assert (answer.status, error_of(await answer.text())["type"]) == (400, "invalid_request_error")
    assert both.smg.asked == []


async def test_a_body_beyond_the_bound_is_refused(both: Both) -> None:
    async with both.client.post(
        "/v1/completions", data=io.BytesIO(b" " * (MAX_BODY_BYTES + 1)), headers=BEARER
    ) as answer:
        assert (answer.status, error_of(await answer.text())["code"]) == (413, "too_large")


async def test_a_body_is_refused_by_the_length_that_it_announces(both: Both) -> None:
    headers = {**BEARER, "Content-Length": str(MAX_BODY_BYTES + 1), "Expect": "100-continue"}
    async with both.client.post("/v1/completions", data=b"", headers=headers) as answer:
        assert (answer.status, error_of(await answer.text())["code"]) == (413, "too_large")


async def test_a_body_that_announces_no_length_is_cut_off_at_the_bound(both: Both) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 50_000 + 1):
            yield b" " * 50_000

    async with both.client.post("/v1/completions", data=pieces(), headers=BEARER) as answer:
        assert (answer.status, error_of(await answer.text())["code"]) == (413, "too_large")
    assert both.smg.asked == []


async def test_bodies_that_are_read_together_have_a_bound(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "MAX_UNREAD_BODY_BYTES", 2000)
    monkeypatch.setattr(front_module, "BODY_TIMEOUT_S", 0.2)

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    headers = {**BEARER, "Content-Length": "1500"}
    async with both.client.post("/v1/completions", data=endless(), headers=headers) as answer:
        assert (answer.status, error_of(await answer.text())["code"]) == (408, "request_timeout")
    async with both.client.post("/v1/completions", data=b" " * 2001, headers=BEARER) as answer:
        assert answer.status == 429
    assert (await both.post("completions", {"prompt": "x" * 900}))[0] == 200
    assert (await both.post("completions", {"prompt": "x" * 900}))[0] == 200


async def test_smgs_own_status_is_passed_on(both: Both) -> None:
    assert (await both.post("completions", {"prompt": "x", "user": "teapot"}))[0] == 418


async def test_a_stream_comes_whole_and_its_bytes_are_those_of_the_text(both: Both) -> None:
    status, text = await both.post("chat/completions", CHAT | {"stream": True, "logprobs": True})
    first, done, rest = text.split("\n\n")
    assert (status, done, rest) == (200, "data: [DONE]", "")
    (choice,) = json.loads(first.removeprefix("data: "))["choices"]
    assert choice["logprobs"]["content"] == [{"token": "\U0001f600", "bytes": list("\U0001f600".encode())}]
    _, untouched = await both.post("chat/completions", CHAT | {"stream": True})
    assert json.loads(untouched.partition("\n\n")[0].removeprefix("data: ")) == EVENT


async def test_an_event_without_an_end_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "MAX_EVENT_BYTES", 1000)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 100

    answer: Any = SimpleNamespace(content=SimpleNamespace(iter_any=endless))
    with pytest.raises(Exception, match="without an end"):
        [event async for event in front_module._events(answer)]


async def test_a_client_that_hangs_up_ends_its_request(both: Both) -> None:
    asking = asyncio.create_task(both.post("completions", {"prompt": "x", "user": "hold"}))
    async with asyncio.timeout(30):
        await both.smg.holding.wait()
        asking.cancel()
        await both.smg.left.wait()


async def test_more_requests_than_there_is_room_for_are_told_to_come_again(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "MAX_REQUESTS", 1)
    first = asyncio.create_task(both.post("completions", {"prompt": "x", "user": "hold"}))
    async with asyncio.timeout(30):
        await both.smg.holding.wait()
        async with both.client.post("/v1/completions", json={"prompt": "x"}, headers=BEARER) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        first.cancel()
        await both.smg.left.wait()


async def test_readiness_needs_no_key_and_is_smgs(both: Both) -> None:
    async with both.client.get("/readiness") as answer:
        assert answer.status == 200
    both.smg.ready = False
    async with both.client.get("/readiness") as answer:
        assert answer.status == 503


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("box.example:8000", 200), ("localhost:8000", 200), ("127.0.0.1:8000", 200)],
)
async def test_without_keys_a_page_of_a_foreign_name_cannot_ask(both: Both, host: str, status: int) -> None:
    front = OpenAIFront(both.smg.url, (), "inner", MAX_BODY_BYTES, names=HostNames(["box.example"], "--names"))
    async with (
        TestClient(TestServer(front.application())) as client,
        client.post("/v1/completions", json={"prompt": "x"}, headers={"Host": host}) as answer,
    ):
        assert answer.status == status
        if status == 403:
            error = error_of(await answer.text())
            assert error["code"] == "host_refused"
            assert "--names" in error["message"]
    assert len(both.smg.asked) == (status == 200)


async def test_with_a_key_every_name_may_ask(both: Both) -> None:
    headers = {"Host": "front.example", "Authorization": f"Bearer {KEYS[0]}"}
    assert (await both.post("completions", {"prompt": "x"}, headers=headers))[0] == 200


async def test_an_smg_that_is_gone_is_an_error_that_says_to_come_again() -> None:
    front = OpenAIFront("http://127.0.0.1:9", (), "inner", MAX_BODY_BYTES)  # the discard port: nobody listens
    async with (
        TestClient(TestServer(front.application())) as client,
        client.post("/v1/completions", json={"prompt": "x"}) as answer,
    ):
        assert (answer.status, error_of(await answer.text())["type"]) == (503, "server_error")


async def test_the_session_to_smg_takes_no_proxy(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert (await both.post("completions", {"prompt": "x"}))[0] == 200


def front_with_keys(both: Both, folder: Path, keys: Mapping[str, str]) -> OpenAIFront:
    """A front before the same smg, with keys of these roles, each of a tenant of its role's name."""
    entries = [
        f"{{id: {role}, sha256: {digest_of(key)}, tenant: {role}, roles: [{role}]}}" for role, key in keys.items()
    ]
    (folder / "keys.yaml").write_text(f"keys: [{', '.join(entries)}]")
    security = ProcessSecurity.of(SecuritySettings(keys_file=f"{folder}/keys.yaml"), Role.FRONT)
    return OpenAIFront(both.smg.url, ("static",), "inner", MAX_BODY_BYTES, security.http_guard)


async def test_keys_of_the_keys_file_open_too_and_only_for_clients(both: Both, tmp_path: Path) -> None:
    client_key, metrics_key = new_key(), new_key()
    front = front_with_keys(both, tmp_path, {"client": client_key, "metrics": metrics_key})
    async with TestClient(TestServer(front.application())) as client:
        statuses = {}
        for key in (client_key, metrics_key, "static", "guess", None):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with client.post("/v1/completions", json={"prompt": "x"}, headers=headers) as answer:
                statuses[key] = answer.status
    assert statuses == {client_key: 200, metrics_key: 403, "static": 200, "guess": 401, None: 401}


async def test_smg_gets_an_id_by_which_the_front_knows_the_client(both: Both, tmp_path: Path) -> None:
    keys = {"client": new_key(), "operator": new_key()}
    front = front_with_keys(both, tmp_path, keys)
    both.smg.client_of = front.requests.client_of
    async with TestClient(TestServer(front.application())) as client:
        for key in (*keys.values(), "static"):
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
            async with client.post("/v1/chat/completions", json=CHAT, headers=headers) as answer:
                assert answer.status == 200
    wanted = [Client(role, key) for role, key in keys.items()]
    assert both.smg.clients == [*wanted, FRONT_ITSELF]
    assert len({*both.smg.request_ids, "mine"}) == 4
    assert [front.requests.client_of(request_id + "-0198f") for request_id in both.smg.request_ids] == [None] * 3


async def test_one_tenant_gets_half_of_the_places(both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "MAX_REQUESTS", 4)
    keys = {"client": new_key(), "operator": new_key()}
    front = front_with_keys(both, tmp_path, keys)
    async with TestClient(TestServer(front.application(), handler_cancellation=True)) as client:
        of_one = Both(both.smg, client)
        first, second = ({"Authorization": f"Bearer {key}"} for key in keys.values())
        asking = [
            asyncio.create_task(of_one.post("completions", {"prompt": "x", "user": "hold"}, headers=first))
            for _ in range(2)
        ]
        await wait_until(lambda: len(both.smg.bodies) == 2, "smg has both")
        assert (await of_one.post("completions", {"prompt": "x"}, headers=first))[0] == 429
        assert (await of_one.post("completions", {"prompt": "x"}, headers=second))[0] == 200
        for task in asking:
            task.cancel()


async def test_a_request_ends_when_its_key_is_withdrawn(both: Both) -> None:
    tokens = Tokens({"key": Principal(frozenset({Role.CLIENT}), "t", "t-1", proof="p")})
    guard = Guard(HTTP_RULES[Role.FRONT], [tokens], lambda _: frozenset())
    upstream = str(both.client.make_url("")).rstrip("/")
    front = OpenAIFront(upstream, (), KEYS[0], MAX_BODY_BYTES, guard)
    body = {"prompt": "x", "user": "hold"}
    async with TestClient(TestServer(front.application())) as client, asyncio.timeout(30):
        asking = asyncio.create_task(client.post("/v1/completions", json=body, headers={"Authorization": "Bearer key"}))
        await both.smg.holding.wait()
        tokens.principals.clear()
        assert guard.end_withdrawn() == 1
        assert (await asking).status == 401
        await both.smg.left.wait()
