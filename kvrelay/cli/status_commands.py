"""Commands that show what is going on: status, requests, health."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.client_session import open_client
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.views.output import console, print_error, print_json, print_note
from kvrelay.config.settings import ClientSettings
from kvrelay.config.sources import SettingsSources
from kvrelay.errors import AccessDeniedError, KvrelayError, UnauthenticatedError, UnsupportedError

if TYPE_CHECKING:
    from kvrelay.client import Client, Cluster

Json = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]


@takes_settings(ClientSettings)
def status(
    sources: SettingsSources,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval-s", "--interval", min=0.1, metavar="FLOAT", help="Time between two looks.")
    ] = 1.0,
) -> None:
    """Show gateways, workers, their load and KV blocks, and running requests."""
    with open_client(sources) as client:
        if watch and not json:
            _watch(client, interval_s)
        while True:
            cluster = client.cluster()
            if json:
                print_json(cluster)
            else:
                from kvrelay.cli.views.status_tables import cluster_view

                console().print(cluster_view(cluster))
            if not watch:
                return
            time.sleep(interval_s)


@takes_settings(ClientSettings)
def requests(
    sources: SettingsSources,
    active: Annotated[bool, typer.Option("--active", help="Only those that have not ended.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many, newest first.")] = 20,
    json: Json = False,
) -> None:
    """List known requests, newest first."""
    with open_client(sources) as client:
        page = client.list_requests(page_size=limit, active_only=active)
    if json:
        for request in page.requests:
            print_json(request)
        return
    from kvrelay.cli.views.status_tables import request_table

    console().print(request_table("Requests", page.requests))


@takes_settings(ClientSettings)
def health(
    sources: SettingsSources,
    json: Json = False,
    allow_degraded: Annotated[bool, typer.Option("--allow-degraded", help="Exit with 0 also when degraded.")] = False,
) -> None:
    """Check a gateway or worker. Exits with 0 when it serves, 1 when it does not, 2 when it serves
    but cannot keep state.
    """
    with open_client(sources) as client:
        try:
            answer = client.health()
            cluster = _cluster_of(client) if answer.serving else None
        except KvrelayError as error:
            if json:
                print_json({"state": "unreachable", "error": error.message})
            else:
                print_error(error)
            raise typer.Exit(1) from None
    degraded = cluster is not None and cluster.degraded
    state = "not serving" if not answer.serving else "degraded" if degraded else "serving"
    if json:
        problem = {"problem": cluster.problem} if cluster is not None and cluster.problem else {}
        flags = {"insecure": answer.insecure, "broken_credentials": answer.broken_credentials}
        raised = {name: True for name, is_raised in flags.items() if is_raised}
        print_json({"state": state, "address": answer.address, **problem, **raised})
    elif cluster is not None and cluster.degraded:
        from kvrelay.cli.views.status_tables import degraded_line

        print(f"{answer.address} {degraded_line(cluster)}")
    else:
        print(f"{answer.address} {state}")
    if answer.insecure and not json:
        print_note("it runs with --insecure: everybody who reaches it has all rights, or keys come to it in plain text")
    if answer.broken_credentials and not json:
        print_note(
            "a changed file of keys or certificates cannot be used, and what it had before counts: "
            "its log names the file and what to mend"
        )
    if not answer.serving:
        raise typer.Exit(1)
    if degraded and not allow_degraded:
        raise typer.Exit(2)


def _cluster_of(client: "Client") -> "Cluster | None":
    try:
        return client.cluster()
    # A worker has only its own health, and not every caller may see the cluster.
    except (UnsupportedError, UnauthenticatedError, AccessDeniedError):
        return None


def _watch(client: "Client", interval_s: float) -> None:
    from rich.live import Live

    from kvrelay.cli.views.status_tables import cluster_view

    with Live(
        cluster_view(client.cluster()), console=console(), auto_refresh=False, screen=console().is_terminal
    ) as live:
        while True:
            time.sleep(interval_s)
            live.update(cluster_view(client.cluster()), refresh=True)
