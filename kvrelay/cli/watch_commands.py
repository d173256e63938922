"""Commands that show what happens or happened: top, trace."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.client_session import open_client
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.views.output import console, print_json
from kvrelay.config.settings import ClientSettings
from kvrelay.config.sources import SettingsSources
from kvrelay.errors import RequestNotFoundError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvrelay.client import Client, Cluster

NUM_LAST_REQUESTS = 20


@takes_settings(ClientSettings)
def trace(
    sources: SettingsSources,
    request_id: Annotated[
        str, typer.Argument(help="Of the request; the newest one when absent.", show_default=False)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="JSON, for programs.")] = False,
) -> None:
    """Show what happened when to a request: attempts, queue, prompt chunks, KV on the wire, tokens."""
    with open_client(sources) as client:
        answer = client.timeline(request_id or _newest_request(client))
    if json:
        print_json(answer)
        return
    from kvrelay.cli.views.waterfall import Waterfall

    console().print(Waterfall(answer))


@takes_settings(ClientSettings)
def top(
    sources: SettingsSources,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end, without rates; for scripts.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval-s", "--interval", min=0.1, metavar="FLOAT", help="Time between two looks.")
    ] = 1.0,
) -> None:
    """Show load, KV blocks, transfers, rates and requests live, until Ctrl-C."""
    with open_client(sources) as client:
        look = _Look(client)
        if once:
            console().print(look.view())
            return
        from rich.live import Live

        with Live(look.view(), console=console(), auto_refresh=False, screen=console().is_terminal) as live:
            while True:
                time.sleep(interval_s)
                live.update(look.view(), refresh=True)


class _Look:
    def __init__(self, client: "Client") -> None:
        self._client = client
        self._before: tuple[float, Cluster] | None = None

    def view(self) -> "RenderableType":
        from kvrelay.cli.views.top_view import rates_between, top_view

        now = (time.monotonic(), self._client.cluster())
        requests = self._client.list_requests(page_size=NUM_LAST_REQUESTS).requests
        running = {request.request_id: request for request in now[1].running_requests}
        rates, self._before = rates_between(self._before, now), now
        # The gateway's state of a running request is newer than the store's.
        known = [running.pop(request.request_id, request) for request in requests]
        return top_view(now[1], [*running.values(), *known], rates)


def _newest_request(client: "Client") -> str:
    requests = client.list_requests(page_size=1).requests
    if not requests:
        raise RequestNotFoundError("no request is known yet; send one, and ask again")
    return requests[0].request_id
