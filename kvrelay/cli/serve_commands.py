"""Commands that serve: one process of a role, or a whole cluster on this machine."""

import importlib
import inspect
import os
import sys
from typing import Any, NoReturn

import typer

from kvrelay.cli.setting_options import takes_settings
from kvrelay.config import ClusterSettings, DecodeSettings, GatewaySettings, PrefillSettings, Settings
from kvrelay.errors import StartupError
from kvrelay.garbage_collection import pause_collection
from kvrelay.settings_sources import SettingsSources

app = typer.Typer(help="Run the gateway, a worker, or everything.", no_args_is_help=True)

# Named here and imported when they run: the client's command line must not need torch, and kvrelay imports none of the services.
_MODULES = {"gateway": "gateway.main", "prefill": "prefill_worker.main", "decode": "decode_worker.main"}


@app.command("gateway")
@takes_settings(GatewaySettings)
def serve_gateway(sources: SettingsSources) -> None:
    """Run a gateway: what clients talk to."""
    _run_role("gateway", sources.load("gateway", GatewaySettings))


@app.command("prefill")
@takes_settings(PrefillSettings)
def serve_prefill(sources: SettingsSources) -> None:
    """Run a prefill worker: computes prompts and ships their KV cache."""
    _run_role("prefill", sources.load("prefill", PrefillSettings))


@app.command("decode")
@takes_settings(DecodeSettings)
def serve_decode(sources: SettingsSources) -> None:
    """Run a decode worker: continues sequences one token at a time."""
    _run_role("decode", sources.load("decode", DecodeSettings))


@app.command("all")
@takes_settings(ClusterSettings, GatewaySettings, PrefillSettings, DecodeSettings)
def serve_all(sources: SettingsSources) -> None:
    """Run a whole cluster here: Valkey unless --redis-url is given, gateway and workers. Ctrl-C ends it.

    Settings hold for every process that has them; --port and --advertise-address for the gateway only.
    """
    from kvrelay.cli.supervisor import serve_cluster

    serve_cluster(sources)


def _run_role(role: str, settings: Settings) -> None:
    """Imports the role's module, runs it until it ends, and ends the process.

    Raises:
        StartupError: a library that the role needs is not installed.
    """
    pause_collection()
    try:
        module: Any = importlib.import_module(_MODULES[role])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == _MODULES[role].partition(".")[0]:
            raise
        advice = "install the worker's libraries: pip install 'kvrelay[worker]'"
        raise StartupError(f"cannot serve {role}: {error.name} is not installed; {advice}") from None
    result = module.run(settings)
    if inspect.iscoroutine(result):
        import asyncio

        result = asyncio.run(result)
    _leave(int(result or 0))


def _leave(exit_code: int) -> NoReturn:
    """Ends the process at once: taking torch and gRPC apart takes seconds on a busy machine, and a supervisor waits for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
