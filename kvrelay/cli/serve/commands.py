"""Serves one role, or a whole cluster."""

import importlib
import inspect
import os
import sys
from typing import Any, NoReturn

import typer

from kvrelay.cli.setting_options import takes_settings
from kvrelay.config.base import Settings
from kvrelay.config.settings import (
    ClusterSettings,
    DecodeSettings,
    GatewaySettings,
    OpenAISettings,
    PrefillSettings,
)
from kvrelay.config.sources import SettingsSources
from kvrelay.errors import StartupError
from kvrelay.runtime.extras import extra_of, missing_extra
from kvrelay.runtime.garbage_collection import pause_collection

app = typer.Typer(help="Run the gateway, a worker, or everything.", no_args_is_help=True)

# Named here and imported when they run: the client's command line must not need torch, and kvrelay
# imports none of the services.
_MODULES = {
    "gateway": "gateway.main",
    "prefill": "prefill_worker.main",
    "decode": "decode_worker.main",
    "openai": "kvrelay.openai_frontend.main",
}


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


@app.command("openai")
@takes_settings(OpenAISettings)
def serve_openai(sources: SettingsSources) -> None:
    """Run OpenAI's HTTP API before gateways; needs the extra openai."""
    _run_role("openai", sources.load("openai", OpenAISettings))


@app.command("all")
@takes_settings(ClusterSettings, GatewaySettings, PrefillSettings, DecodeSettings)
def serve_all(sources: SettingsSources) -> None:
    """Run a whole cluster here: Valkey unless --redis-url is given, gateway and workers. Ctrl-C
    ends it.

    Settings hold for every process that has them; --port and --advertise-address for the gateway
    only.
    """
    from kvrelay.cli.serve.supervisor import serve_cluster

    serve_cluster(sources)


def _run_role(role: str, settings: Settings) -> None:
    pause_collection()
    if isinstance(settings, PrefillSettings | DecodeSettings):
        from kvrelay.cli.serve.preflight import check_worker

        check_worker(settings)
    try:
        module: Any = importlib.import_module(_MODULES[role])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == _MODULES[role].partition(".")[0]:
            raise
        advice = missing_extra(extra_of(error.name))
        raise StartupError(f"cannot serve {role}: {error.name} is not installed; {advice}") from None
    result = module.run(settings)
    if inspect.iscoroutine(result):
        import asyncio

        result = asyncio.run(result)
    _leave(int(result or 0))


def _leave(exit_code: int) -> NoReturn:
    """Without the teardown of torch and gRPC, which takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
