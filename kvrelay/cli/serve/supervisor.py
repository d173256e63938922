"""`serve all` in the foreground, until a signal ends it."""

import asyncio
import signal
import sys

from rich.console import Console
from rich.text import Text

from kvrelay.cli.model_commands import prepare_models
from kvrelay.cli.serve.preflight import check_cluster
from kvrelay.cluster.local_cluster import GATEWAY_NAME, LocalCluster
from kvrelay.config.settings import (
    HTTP_PORT_ABOVE,
    ClusterSettings,
    DecodeSettings,
    GatewaySettings,
    OpenAISettings,
    PrefillSettings,
)
from kvrelay.config.sources import SettingsSources
from kvrelay.network.host_port import MAX_PORT
from kvrelay.runtime.child_process import LineSink

_COLOURS = {"gateway": "cyan", "prefill": "green", "decode": "magenta"}
_OWN_NAME = "kvrelay"


class LogPrinter:
    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, name: str, line: str) -> None:
        colour = _COLOURS.get(name.partition("-")[0], "yellow")
        prefix = Text(f"{name:<10}| ", style=colour)
        # from_ansi keeps the children's own colours and drops other control sequences.
        self._console.print(prefix + Text.from_ansi(line), soft_wrap=True)


def cluster_of(sources: SettingsSources, on_line: LineSink) -> LocalCluster:
    cluster = sources.load("cluster", ClusterSettings)
    gateway = sources.load("gateway", GatewaySettings)
    return LocalCluster(
        gateway=gateway,
        prefill=[sources.load("prefill", PrefillSettings)] * cluster.num_prefill,
        decode=[sources.load("decode", DecodeSettings)] * cluster.num_decode,
        redis_url=gateway.server.required_redis_url() if gateway.server.redis_url is not None else None,
        openai=_openai(cluster, gateway),
        tls_folder=gateway.security.tls_folder,
        restart=cluster.restart,
        hang_timeout_s=cluster.hang_timeout_s,
        startup_timeout_s=cluster.startup_timeout_s,
        on_line=on_line,
    )


def _openai(cluster: ClusterSettings, gateway: GatewaySettings) -> OpenAISettings | None:
    if cluster.openai_port is None:
        return None
    return OpenAISettings(
        port=cluster.openai_port,
        openai_api_key=cluster.openai_api_key,
        openai_args=cluster.openai_args,
        openai_allowed_hosts=cluster.openai_allowed_hosts,
        openai_max_body_kib=cluster.openai_max_body_kib,
        local_clients=gateway.peers.local_clients,
        security=gateway.security,
        log_level=gateway.server.log_level,
        log_format=gateway.server.log_format,
    )


def serve_cluster(sources: SettingsSources) -> None:
    printer = LogPrinter(Console(file=sys.stderr, highlight=False))
    cluster = cluster_of(sources, printer)
    cluster.gateway = with_http_port(cluster.gateway)
    openai_port = None if cluster.openai is None else cluster.openai.port
    check_cluster(cluster.gateway, cluster.prefill, cluster.decode, cluster.redis_url, openai_port)
    prepare_models([*(worker.engine for worker in cluster.prefill), *(worker.engine for worker in cluster.decode)])
    asyncio.run(run_until_signal(cluster, printer))


def _ready_lines(cluster: LocalCluster) -> list[str]:
    lines = [f"ready: the gateway is {cluster.gateway_address}; Ctrl-C ends everything"]
    scheme = "http" if cluster.tls_folder is None and cluster.gateway.security.tls_cert is None else "https"
    if cluster.openai_address:
        lines.append(f"  OpenAI's API  {scheme}://{cluster.openai_address}/v1")
    if GATEWAY_NAME in cluster.http_addresses:
        gateway_scheme = "http" if cluster.gateway.peers.local_clients else scheme
        lines.append(f"  live page     {gateway_scheme}://{cluster.http_addresses[GATEWAY_NAME]}")
    workers = ", ".join(
        f"{name} {scheme}://{address}" for name, address in cluster.http_addresses.items() if name != GATEWAY_NAME
    )
    return [*lines, f"  metrics       {workers}"] if workers else lines


def with_http_port(gateway: GatewaySettings) -> GatewaySettings:
    """Sets a missing HTTP port: HTTP_PORT_ABOVE above gRPC's, or 0 with gRPC port 0."""
    server = gateway.server
    if server.http_port is not None:
        return gateway
    port = server.port + HTTP_PORT_ABOVE
    chosen = port if server.port and port <= MAX_PORT else 0
    return gateway.model_copy(update={"server": server.model_copy(update={"http_port": chosen})})


async def run_until_signal(cluster: LocalCluster, printer: LogPrinter) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    start = asyncio.create_task(cluster.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([start, stopped], return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
            for line in _ready_lines(cluster):
                printer(_OWN_NAME, line)
            await stopped
        printer(_OWN_NAME, "ending")
    finally:
        start.cancel()
        stopped.cancel()
        await asyncio.wait([start, stopped])
        await cluster.stop()
