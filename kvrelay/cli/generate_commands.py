"""Commands that stream a model's text: complete and resume."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrelay.cli.client_session import open_client
from kvrelay.cli.interruptible import interruptible
from kvrelay.cli.sampling_options import takes_sampling
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.standard_input import text_or_standard_input
from kvrelay.cli.views.output import console, print_json, write_text
from kvrelay.config.settings import MAX_COALESCE_MS, ClientSettings
from kvrelay.config.sources import SettingsSources
from kvrelay.errors import KvrelayError

if TYPE_CHECKING:
    from kvrelay.client import Client, Stream, Turn

Model = Annotated[str, typer.Option("--model", help="Model; not needed when only one is served.", show_default=False)]
Tenant = Annotated[str, typer.Option("--tenant", help="Separates prefix caches of tenants.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per event, for programs.")]
Phases = Annotated[bool, typer.Option("--phases", help="Show where the time went.")]
Coalesce = Annotated[
    int | None,
    typer.Option(
        "--coalesce-ms", metavar="MS", help=f"How long to gather tokens: 0 to {MAX_COALESCE_MS}.", show_default=False
    ),
]
Prompt = Annotated[
    str | None,
    typer.Argument(
        help="What to continue. Without one, or with -, it is read from standard input.", show_default=False
    ),
]
System = Annotated[str | None, typer.Option("--system", help="System message of the chat.")]

_CANCEL_TIMEOUT_S = 2.0


@takes_settings(ClientSettings)
@takes_sampling
def complete(
    sources: SettingsSources,
    sampling: dict[str, Any],
    prompt: Prompt = None,
    model: Model = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's chat message.")] = False,
    system: System = None,
    tenant: Tenant = "",
    resumable: Annotated[bool, typer.Option(help="Continue after a lost connection.")] = True,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A second request with the same key joins the first.")
    ] = None,
    coalesce_ms: Coalesce = None,
    json: Json = False,
    phases: Phases = False,
) -> None:
    """Continue a prompt, streaming the text."""
    text = text_or_standard_input(prompt, "prompt")
    messages = [_message("user", text)] if chat or system is not None else None
    if system is not None and messages is not None:
        messages.insert(0, _message("system", system))

    with (
        open_client(sources) as client,
        client.generate(
            None if messages else text,
            messages=messages,
            model=model,
            tenant=tenant,
            resumable=resumable,
            idempotency_key=idempotency_key,
            coalesce_ms=coalesce_ms,
            **sampling,
        ) as stream,
        _cancelling(client, stream),
    ):
        show_stream(stream, json, phases)


@takes_settings(ClientSettings)
def resume(
    sources: SettingsSources,
    request_id: Annotated[str, typer.Argument(help="The request, as in `kvrelay requests`.")],
    from_index: Annotated[int, typer.Option("--from-index", min=0, help="First output token wanted.")] = 0,
    coalesce_ms: Coalesce = None,
    json: Json = False,
    phases: Phases = False,
) -> None:
    """Stream a request's output again, and follow it while it runs."""
    with open_client(sources) as client, client.resume(request_id, from_index, coalesce_ms=coalesce_ms) as stream:
        show_stream(stream, json, phases)


def show_stream(stream: "Stream | Turn", json: bool, phases: bool, shown: list[str] | None = None) -> None:
    """Shows the first sequence as it comes, the others at the end. `shown` gets the first's text."""
    shown = [] if shown is None else shown
    if json:
        _show_events(stream, shown)
        return
    for delta in interruptible(stream):
        if delta.sequence == 0:
            shown.append(delta.text)
            write_text(delta.text)
    completion = stream.completion()
    for number, output in enumerate(completion.outputs):
        if number > 0:
            print(f"--- answer {number + 1}:")
            write_text(output.text)
        if not output.text.endswith("\n"):
            print(flush=True)
    if phases:
        from kvrelay.cli.views.phase_table import phase_table

        console(stderr=True).print(phase_table(completion.finished))


@contextmanager
def _cancelling(client: "Client", stream: "Stream") -> Iterator[None]:
    """Cancels the request on Ctrl-C or a closed pipe; a resumable one would run on."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        if stream.accepted is not None and stream.finished is None:
            with suppress(KvrelayError):
                client.cancel(stream.accepted.request_id, timeout_s=_CANCEL_TIMEOUT_S)
        raise


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _show_events(stream: "Stream | Turn", shown: list[str]) -> None:
    seen = False
    for delta in interruptible(stream):
        if delta.sequence == 0:
            shown.append(delta.text)
        if not seen:
            print_json({"accepted": stream.accepted})
            seen = True
        print_json({"delta": delta})
    if not seen:
        print_json({"accepted": stream.accepted})
    print_json({"finished": stream.finished})
