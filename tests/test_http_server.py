"""The HTTP port: health, routes of others, taken ports, and nothing at all where none is asked for."""

import subprocess
import sys

import aiohttp
import pytest
from aiohttp import web

from kvrelay.cli.supervisor import with_http_port
from kvrelay.config import GatewaySettings
from kvrelay.errors import StartupError
from kvrelay.http_server import Health, serving_http

HOST = "127.0.0.1"


async def get(port: int | None, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{HOST}:{port}{path}") as response:
        return response.status, await response.text()


async def test_health_says_what_the_process_says_of_itself() -> None:
    states = iter([Health.SERVING, Health.DEGRADED, Health.DRAINING])
    async with serving_http(HOST, 0, lambda: next(states)) as port:
        answers = [await get(port, "/healthz") for _ in range(3)]
    assert answers == [(200, '{"status": "serving"}'), (200, '{"status": "degraded"}'), (503, '{"status": "draining"}')]


async def test_others_add_routes() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="here")

    def add(application: web.Application) -> None:
        application.router.add_get("/there", answer)

    async with serving_http(HOST, 0, lambda: Health.SERVING, add) as port:
        assert await get(port, "/there") == (200, "here")
        assert (await get(port, "/elsewhere"))[0] == 404


async def test_a_taken_port_is_named() -> None:
    async with serving_http(HOST, 0, lambda: Health.SERVING) as port:
        with pytest.raises(StartupError, match=f"cannot listen on {HOST}:{port} for HTTP"):
            async with serving_http(HOST, port, lambda: Health.SERVING):
                pass


async def test_without_a_port_nothing_is_served_and_aiohttp_is_not_imported() -> None:
    code = """
import asyncio, sys
from kvrelay.http_server import Health, serving_http
import gateway.main, kvrelay.cli.app
async def main():
    async with serving_http("127.0.0.1", None, lambda: Health.SERVING) as port:
        # Not the SDK of opentelemetry: the redis client imports that by itself where it is installed.
        print(port, {"aiohttp", "prometheus_client", "opentelemetry.exporter"} & set(sys.modules))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)  # noqa: ASYNC221
    assert done.stdout == "None set()\n"


def test_serve_all_has_a_port_for_http_beside_the_one_for_grpc() -> None:
    def chosen(**server: object) -> int | None:
        settings = GatewaySettings()
        return with_http_port(settings.model_copy(update={"server": settings.server.model_copy(update=server)})).server.http_port

    assert (chosen(), chosen(port=0), chosen(port=65530), chosen(http_port=7)) == (50080, 0, 0, 7)
