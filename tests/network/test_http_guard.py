"""The HTTP port takes keys as Bearer and as Basic, and ends answers whose key is withdrawn."""

import asyncio
import base64
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from kvrelay.network.http_server import Health, serving_http
from kvrelay.security.guard import Guard
from kvrelay.security.method_rules import OPEN, Rule
from kvrelay.security.principal import Principal, Role, current_principal
from tests.security.test_guard import Tokens

ANNA = Principal(frozenset({Role.OPERATOR}), None, "anna", proof="a")
BOB = Principal(frozenset({Role.CLIENT}), "bob", "bob", proof="b")


class Server:
    def __init__(self) -> None:
        self.tokens = Tokens({"anna-key": ANNA, "bob-key": BOB})
        rule = Rule(frozenset({Role.OPERATOR}))
        rules = {"GET /healthz": OPEN, "GET /page/{name}": rule, "GET /endless": rule}
        self.guard = Guard(rules, [self.tokens], lambda _: frozenset())
        self.callers: list[Principal] = []

    def add_routes(self, application: web.Application) -> None:
        async def page(request: web.Request) -> web.Response:
            self.callers.append(current_principal())
            return web.Response(text="page")

        async def endless(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"begun")
            await asyncio.Event().wait()
            return response

        application.router.add_get("/page/{name}", page)
        application.router.add_get("/endless", endless)
        application.router.add_get("/new", page)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def session(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with (
        serving_http("127.0.0.1", 0, lambda: Health.SERVING, server.add_routes, guard=server.guard) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):
        yield session


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"any name:{key}".encode()).decode()}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def status(session: aiohttp.ClientSession, path: str, headers: dict[str, str], method: str = "GET") -> int:
    async with session.request(method, path, headers=headers) as answer:
        if answer.status == 401:
            assert "Basic" in answer.headers["WWW-Authenticate"]
        return answer.status


async def test_a_key_lets_its_owner_in_as_bearer_and_as_password(
    server: Server, session: aiohttp.ClientSession
) -> None:
    for headers in (bearer("anna-key"), basic("anna-key")):
        assert await status(session, "/page/x", headers) == 200
        assert await status(session, "/page/x", headers, "HEAD") == 200
    assert server.callers == [ANNA] * 4


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("other"),
        basic("other"),
        {"Authorization": "Basic ?"},
        {"Authorization": "Basic"},
        {"Authorization": ""},
    ],
)
async def test_without_a_key_nothing_but_health_is_answered(
    server: Server, session: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    assert await status(session, "/page/x", headers) == 401
    assert await status(session, "/page/x", headers, "HEAD") == 401
    assert await status(session, "/healthz", headers) == 200
    assert server.callers == []


async def test_a_role_that_does_not_reach_and_a_route_without_a_rule_are_refused(
    server: Server, session: aiohttp.ClientSession
) -> None:
    assert await status(session, "/page/x", bearer("bob-key")) == 403
    assert await status(session, "/new", bearer("anna-key")) == 403
    assert await status(session, "/unknown", {}) == 404
    assert server.callers == []


async def test_an_answer_breaks_off_when_its_key_is_withdrawn(server: Server, session: aiohttp.ClientSession) -> None:
    async with session.get("/endless", headers=bearer("anna-key")) as answer:
        assert await answer.content.readexactly(5) == b"begun"
        server.tokens.principals.clear()
        assert server.guard.end_withdrawn() == 1
        with pytest.raises(aiohttp.ClientError):
            await answer.content.read()
