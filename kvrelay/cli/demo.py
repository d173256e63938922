"""`kvrelay demo`: starts a cluster for one answer and shows its phases."""

import asyncio
import os
import signal
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from kvrelay.cli.model_commands import prepare_models
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.views.output import console, print_json, print_note, write_text
from kvrelay.config.settings import ClusterSettings, DecodeSettings, EngineSettings, GatewaySettings, PrefillSettings
from kvrelay.config.sources import SettingsSources, setting_fields
from kvrelay.errors import StartupError

if TYPE_CHECKING:
    from kvrelay.cluster.local_cluster import LocalCluster

# Long enough to run on the prefill worker, so that its KV cache travels.
DEFAULT_PROMPT = (
    "The sky is blue because air scatters sunlight. Sunlight holds all colours. Blue light has a short wave and is "
    "scattered about ten times as much as red light, so blue reaches our eyes from every part of the sky. In the "
    "evening sunlight crosses much more air: most of the blue is scattered out of it on the way, and what is left "
    "looks orange or red. On the Moon there is no air, and the sky there is black even by day.\n\n"
    "Explain in three short sentences why the sky is blue at noon, red in the evening, and black on the Moon."
)
_TIMEOUT_S = 240.0
_FIELDS = {*setting_fields(EngineSettings), *setting_fields(ClusterSettings), "redis_url", "log_level"} - {"restart"}


@takes_settings(ClusterSettings, PrefillSettings, DecodeSettings, only=_FIELDS)
def demo(
    sources: SettingsSources,
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask.", show_default=False)] = DEFAULT_PROMPT,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="INT", help="Most tokens of the answer.")
    ] = 128,
    json: Annotated[bool, typer.Option("--json", help="One JSON object with everything, for programs.")] = False,
) -> None:
    """Start a cluster, stream an answer, show the request's phases, end the cluster."""
    from kvrelay.cli.serve.preflight import check_cluster

    prefill, decode = sources.load("prefill", PrefillSettings), sources.load("decode", DecodeSettings)
    gateway = _on_free_port(sources.load("gateway", GatewaySettings))
    check_cluster(gateway, [prefill], [decode], gateway.server.redis_url, openai_port=None)
    prepare_models([prefill.engine, decode.engine])
    log_path = _make_log()
    try:
        with log_path.open("w", encoding="utf-8") as log:
            asyncio.run(_run(sources, prompt, max_tokens, json, log))
    except BaseException:
        print_note(f"The processes' log: {log_path}")
        raise
    log_path.unlink()


def _make_log() -> Path:
    try:
        descriptor, path = tempfile.mkstemp(prefix="kvrelay-demo-", suffix=".log")
    except OSError as error:
        raise StartupError(
            "there is no folder for temporary files, which the demo's log needs; "
            "set TMPDIR to one that can be written to"
        ) from error
    os.close(descriptor)
    return Path(path)


async def _run(sources: SettingsSources, prompt: str, max_tokens: int, json: bool, log: TextIO) -> None:
    from kvrelay.cli.serve.supervisor import cluster_of

    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    cluster = cluster_of(sources, lambda name, line: print(f"{name:<10}| {line}", file=log, flush=True))
    # A short prompt would stay on the decode worker, without a handoff to see.
    requests = cluster.gateway.requests.model_copy(update={"local_prefill_tokens": 0})
    cluster.gateway = _on_free_port(cluster.gateway).model_copy(update={"requests": requests})
    cluster.restart = False
    terminal = console(stderr=True)
    waiting = terminal.status(f"starting {processes_in_words(cluster)} ...") if terminal.is_terminal else nullcontext()
    try:
        with waiting:
            await cluster.start()
        if not json:
            terminal.print(f"[bold]Up: {processes_in_words(cluster)}.[/bold] The prompt:\n")
            terminal.print(prompt, style="dim", markup=False)
            terminal.print("\n[bold]The answer:[/bold]\n")
        await _answer(cluster.gateway_address, prompt, max_tokens, json)
    finally:
        await cluster.stop()


def processes_in_words(cluster: "LocalCluster") -> str:
    """Such as "Valkey, a gateway, 1 prefill worker and 2 decode workers"."""
    names = ["a gateway"] if cluster.redis_url is not None and cluster.valkey is None else ["Valkey", "a gateway"]
    counts = [
        f"{number} {role} worker{'' if number == 1 else 's'}"
        for role, number in (("prefill", len(cluster.prefill)), ("decode", len(cluster.decode)))
        if number
    ]
    *first, last = [*names, *counts]
    return f"{', '.join(first)} and {last}"


def _on_free_port(gateway: GatewaySettings) -> GatewaySettings:
    return gateway.model_copy(update={"server": gateway.server.model_copy(update={"port": 0})})


async def _answer(address: str, prompt: str, max_tokens: int, json: bool) -> None:
    from kvrelay.cli.views.phase_table import gigabytes_per_second, phase_table, tokens_per_second
    from kvrelay.client import AsyncClient, ChatMessage

    async with (
        AsyncClient(address, timeout_s=_TIMEOUT_S) as client,
        client.generate(messages=[ChatMessage("user", prompt)], temperature=0.0, max_tokens=max_tokens) as stream,
    ):
        async for delta in stream:
            if not json:
                write_text(delta.text)
        completion = await stream.completion()
    if json:
        print_json(
            {
                "prompt": prompt,
                "text": completion.text,
                "accepted": completion.accepted,
                "finished": completion.finished,
                "tokens_per_second": tokens_per_second(completion.finished),
                "transfer_gigabytes_per_second": gigabytes_per_second(completion.finished),
            }
        )
        return
    print("\n")
    console().print(phase_table(completion.finished))
