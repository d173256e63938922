"""The HTTP port: health, routes of others, taken ports, and nothing at all where none is asked for."""

import asyncio
import json
import subprocess
import sys

import aiohttp
import pytest
from aiohttp import web

from kvrelay.cli.serve.supervisor import _ready_lines, with_http_port
from kvrelay.cluster.local_cluster import LocalCluster
from kvrelay.config.security_settings import PeerSettings
from kvrelay.config.settings import GatewaySettings
from kvrelay.errors import StartupError
from kvrelay.network.http_bounds import MAX_BODY_BYTES, HostNames, HttpBounds
from kvrelay.network.http_server import Health, serving_http

HOST = "127.0.0.1"


async def get(port: int | None, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{HOST}:{port}{path}") as response:
        return response.status, await response.text()


async def test_health_says_what_the_process_says_of_itself() -> None:
    states = iter([Health.SERVING, Health.DEGRADED, Health.DRAINING])
    async with serving_http(HOST, 0, lambda: next(states)) as port:
        answers = [await get(port, "/healthz") for _ in range(3)]
    assert answers == [(200, '{"status": "serving"}'), (200, '{"status": "degraded"}'), (503, '{"status": "draining"}')]


async def test_health_says_what_an_operator_must_mend() -> None:
    notes: dict[str, object] = {}
    async with serving_http(HOST, 0, lambda: Health.SERVING, health_notes=lambda: notes) as port:
        notes["insecure"] = True
        status, text = await get(port, "/healthz")
    assert (status, json.loads(text)) == (200, {"status": "serving", "insecure": True})


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


async def test_what_is_no_http_is_answered_and_leaves_no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with serving_http(HOST, 0, lambda: Health.SERVING) as port:
        assert port is not None
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # how every gRPC client begins
        assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.0 400")
        writer.close()
    assert caplog.records == []


async def test_a_handler_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: web.Request) -> web.Response:
        raise ZeroDivisionError("as written")

    def add(application: web.Application) -> None:
        application.router.add_get("/", fail)

    async with serving_http(HOST, 0, lambda: Health.SERVING, add) as port:
        assert (await get(port, "/"))[0] == 500
    assert "as written" in caplog.text


async def test_without_a_port_nothing_is_served_and_aiohttp_is_not_imported() -> None:
    code = """
import asyncio, sys
from kvrelay.network.http_server import Health, serving_http
import gateway.main, kvrelay.cli.app
async def main():
    async with serving_http("127.0.0.1", None, lambda: Health.SERVING) as port:
        # Not the SDK of opentelemetry: the redis client imports that by itself where it is installed.
        print(port, {"aiohttp", "prometheus_client", "opentelemetry.exporter"} & set(sys.modules))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)  # noqa: ASYNC221
    assert done.stdout == "None set()\n"


async def test_a_foreign_host_name_is_refused_on_every_route() -> None:
    names = HostNames(("box.example", "*.inner.example"))
    async with serving_http(HOST, 0, lambda: Health.SERVING, bounds=HttpBounds(names)) as port:
        statuses = [await status_for(port, host) for host in OWN_HOSTS]
        assert statuses == [200] * len(OWN_HOSTS)
        assert [await status_for(port, host) for host in FOREIGN_HOSTS] == [403] * len(FOREIGN_HOSTS)
        assert await status_for(port, "evil.example", "/nowhere") == 403
    async with serving_http(HOST, 0, lambda: Health.SERVING, bounds=HttpBounds(HostNames("*"))) as port:
        assert await status_for(port, "evil.example") == 200


OWN_HOSTS = (f"{HOST}:50080", "[::1]:80", "10.4.0.9", "localhost", "gateway:50080", "BOX.example.", "a.inner.example")
"""Addresses are kubelet's, a name without a dot is that of a compose service."""
FOREIGN_HOSTS = ("evil.example", "box.example.evil.example", "inner.example", "127.0.0.1.evil.example", "a b", "")


async def status_for(port: int | None, host: str, path: str = "/healthz") -> int:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    line = await asyncio.wait_for(reader.readline(), 30)
    writer.close()
    return int(line.split()[1])


@pytest.mark.parametrize(
    "begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_a_connection_that_asks_nothing_more_is_closed(begun: bytes) -> None:
    async with serving_http(HOST, 0, lambda: Health.SERVING, bounds=HttpBounds(silence_timeout_s=0.3)) as port:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(begun)
        await asyncio.wait_for(reader.read(), 60)  # bounds a hang only
        writer.close()


async def test_connections_above_the_bound_are_closed_and_room_is_given_back() -> None:
    bounds = HttpBounds(max_connections=2, silence_timeout_s=3600.0)
    async with serving_http(HOST, 0, lambda: Health.SERVING, bounds=bounds) as port:
        kept = [await asyncio.open_connection(HOST, port) for _ in range(2)]
        for reader, writer in kept:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asyncio.wait_for(reader.readline(), 30)).split()[1] == b"200"
        reader, writer = await asyncio.open_connection(HOST, port)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        for _, writer in kept:
            writer.close()
            await writer.wait_closed()
        assert await get(port, "/healthz") == (200, '{"status": "serving"}')


async def test_a_large_body_is_refused_before_it_is_read() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    def add(application: web.Application) -> None:
        application.router.add_post("/", answer)

    async with serving_http(HOST, 0, lambda: Health.SERVING, add) as port, aiohttp.ClientSession() as session:
        for num_bytes, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)):
            async with session.post(f"http://{HOST}:{port}/", data=bytes(num_bytes)) as response:
                assert response.status == status


@pytest.mark.parametrize("head", [b"X: " + b"a" * 10_000, b"\r\n".join(b"X-%d: a" % number for number in range(100))])
async def test_a_large_head_is_refused(head: bytes) -> None:
    async with serving_http(HOST, 0, lambda: Health.SERVING) as port:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), 30)).split()[1] == b"400"
        writer.close()


def test_serve_all_has_a_port_for_http_beside_the_one_for_grpc() -> None:
    def chosen(**server: object) -> int | None:
        settings = GatewaySettings()
        return with_http_port(
            settings.model_copy(update={"server": settings.server.model_copy(update=server)})
        ).server.http_port

    assert (chosen(), chosen(port=0), chosen(port=65530), chosen(http_port=7)) == (50080, 0, 0, 7)


@pytest.mark.parametrize(
    ("tls_folder", "local_clients", "of_gateway", "of_worker"),
    [
        (None, False, "http", "http"),
        ("certificates", False, "https", "https"),
        ("certificates", True, "http", "https"),
    ],
)
def test_serve_all_shows_where_its_ports_are(
    tls_folder: str | None, local_clients: bool, of_gateway: str, of_worker: str
) -> None:
    gateway = GatewaySettings(peers=PeerSettings(local_clients=local_clients))
    cluster = LocalCluster(gateway=gateway, tls_folder=tls_folder)
    cluster.http_addresses.update({"gateway": "127.0.0.1:7", "decode-0": "127.0.0.1:8"})
    lines = "\n".join(_ready_lines(cluster))
    assert f"live page     {of_gateway}://127.0.0.1:7" in lines
    assert f"decode-0 {of_worker}://127.0.0.1:8" in lines
