"""`serve all` in the foreground: starts a local cluster, shows the processes' log lines by name, and ends it on a signal."""

import asyncio
import signal
import sys

from rich.console import Console
from rich.text import Text

from kvrelay.child_process import LineSink
from kvrelay.cli.model_commands import prepare_models
from kvrelay.config import HTTP_PORT_ABOVE, ClusterSettings, DecodeSettings, GatewaySettings, PrefillSettings
from kvrelay.local_cluster import LocalCluster
from kvrelay.settings_sources import SettingsSources

_COLOURS = {"gateway": "cyan", "prefill": "green", "decode": "magenta"}
_OWN_NAME = "kvrelay"
MAX_PORT = 65535


class LogPrinter:
    """Prints lines as `name | line`, each role in its colour."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, name: str, line: str) -> None:
        colour = _COLOURS.get(name.partition("-")[0], "yellow")
        prefix = Text(f"{name:<10}| ", style=colour)
        # from_ansi: children that colour their own lines keep their colours, and bring no other control sequences.
        self._console.print(prefix + Text.from_ansi(line), soft_wrap=True)


def cluster_of(sources: SettingsSources, on_line: LineSink) -> LocalCluster:
    """The cluster that the settings describe, not started.

    Raises:
        ConfigError: a setting is wrong.
    """
    cluster = sources.load("cluster", ClusterSettings)
    gateway = sources.load("gateway", GatewaySettings)
    return LocalCluster(
        gateway=gateway,
        prefill=[sources.load("prefill", PrefillSettings)] * cluster.num_prefill,
        decode=[sources.load("decode", DecodeSettings)] * cluster.num_decode,
        redis_url=gateway.server.redis_url,
        openai_port=cluster.openai_port,
        restart=cluster.restart,
        hang_timeout_s=cluster.hang_timeout_s,
        startup_timeout_s=cluster.startup_timeout_s,
        on_line=on_line,
    )


def serve_cluster(sources: SettingsSources) -> None:
    """Runs the cluster until SIGINT or SIGTERM.

    Raises:
        StartupError: it could not be started, or its model not be made.
    """
    printer = LogPrinter(Console(file=sys.stderr, highlight=False))
    cluster = cluster_of(sources, printer)
    cluster.gateway = with_http_port(cluster.gateway)
    prepare_models([*(worker.engine for worker in cluster.prefill), *(worker.engine for worker in cluster.decode)])
    asyncio.run(run_until_signal(cluster, printer))


def with_http_port(gateway: GatewaySettings) -> GatewaySettings:
    """The settings with a port for HTTP, if they have none: above the one for gRPC, or a free one as that is."""
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
            http = "".join(f"; HTTP of {name} is http://{address}" for name, address in cluster.http_addresses.items())
            openai = f"; OpenAI's API is http://{cluster.openai_address}/v1" if cluster.openai_address else ""
            printer(_OWN_NAME, f"ready: the gateway is {cluster.gateway_address}{http}{openai}; Ctrl-C ends everything")
            await stopped
        printer(_OWN_NAME, "ending")
    finally:
        start.cancel()
        stopped.cancel()
        await asyncio.wait([start, stopped])
        await cluster.stop()
