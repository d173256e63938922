"""Commands that stream a model's text: complete, resume and chat."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kvrelay.cli.client_session import open_client
from kvrelay.cli.output import console, print_json, print_note, write_text
from kvrelay.cli.sampling_options import takes_sampling
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.typed_line import read_typed_line
from kvrelay.config import MAX_COALESCE_MS, ClientSettings
from kvrelay.errors import InvalidRequestError, KvrelayError
from kvrelay.settings_sources import SettingsSources

if TYPE_CHECKING:
    from kvrelay.client import Client, Stream, Turn

Model = Annotated[str, typer.Option("--model", help="Model; not needed when only one is served.", show_default=False)]
Tenant = Annotated[str, typer.Option("--tenant", help="Separates prefix caches of tenants.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per event, for programs.")]
Phases = Annotated[bool, typer.Option("--phases", help="Show where the time went.")]
Coalesce = Annotated[
    int | None,
    typer.Option("--coalesce-ms", metavar="MS", help=f"Gather tokens for so long: 0 to {MAX_COALESCE_MS}.", show_default=False),
]
System = Annotated[str | None, typer.Option("--system", help="System message of the chat.")]

_CANCEL_TIMEOUT_S = 2.0


@takes_settings(ClientSettings)
@takes_sampling
def complete(
    sources: SettingsSources,
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")],
    sampling: dict[str, Any],
    model: Model = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's chat message.")] = False,
    system: System = None,
    tenant: Tenant = "",
    resumable: Annotated[bool, typer.Option(help="Continue after a lost connection.")] = True,
    idempotency_key: Annotated[str | None, typer.Option(help="A second request with the same key joins the first.")] = None,
    coalesce_ms: Coalesce = None,
    json: Json = False,
    phases: Phases = False,
) -> None:
    """Continue a prompt, streaming the text."""
    text = sys.stdin.read() if prompt == "-" else prompt
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


@takes_settings(ClientSettings)
@takes_sampling
def chat(
    sources: SettingsSources,
    sampling: dict[str, Any],
    model: Model = "",
    system: System = None,
    tenant: Tenant = "",
    coalesce_ms: Coalesce = None,
    json: Json = False,
    phases: Phases = False,
) -> None:
    """Talk with a model. A line is a turn; /exit or Ctrl-D ends. Also takes its turns from a pipe."""
    if sampling.get("n", 1) != 1:
        raise InvalidRequestError("n", "must be 1 in a chat: one answer continues the conversation")

    news = [_message("system", system)] if system is not None else []
    with (
        open_client(sources) as client,
        client.converse(model=model, tenant=tenant, coalesce_ms=coalesce_ms, **sampling) as conversation,
    ):
        for line in _lines(sys.stdin):
            show_stream(conversation.send([*news, _message("user", line)]), json, phases)
            news = []


def show_stream(stream: "Stream | Turn", json: bool, phases: bool) -> None:
    """Reads a stream to its end. The first sequence is shown as it comes, others, which come interleaved with it, at the end."""
    if json:
        _show_events(stream)
        return
    for delta in stream:
        if delta.sequence == 0:
            write_text(delta.text)
    completion = stream.completion()
    for number, output in enumerate(completion.outputs):
        if number > 0:
            print(f"--- answer {number + 1}:")
            write_text(output.text)
        if not output.text.endswith("\n"):
            print(flush=True)
    if phases:
        from kvrelay.cli.phase_table import phase_table

        console(stderr=True).print(phase_table(completion.finished))


@contextmanager
def _cancelling(client: "Client", stream: "Stream") -> Iterator[None]:
    """Ends the request, which would run on for a while if it is resumable, when its user interrupts it or closes the pipe."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        if stream.accepted is not None and stream.finished is None:
            with suppress(KvrelayError):
                client.cancel(stream.accepted.request_id, timeout_s=_CANCEL_TIMEOUT_S)
        raise


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _show_events(stream: "Stream | Turn") -> None:
    seen = False
    for delta in stream:
        if not seen:
            print_json({"accepted": stream.accepted})
            seen = True
        print_json({"delta": delta})
    if not seen:
        print_json({"accepted": stream.accepted})
    print_json({"finished": stream.finished})


def _lines(source: TextIO) -> Iterator[str]:
    """Turns typed on a terminal, or the lines of a pipe, until /exit or the end. Empty ones are skipped."""
    interactive = source.isatty()
    if interactive:
        print_note("Type a message; /exit or Ctrl-D ends.")
    while True:
        try:
            line = read_typed_line("> ") if interactive else next(source)
        except StopIteration:
            return
        except EOFError:
            print()  # or the shell's prompt would follow ours
            return
        except KeyboardInterrupt:
            print()
            raise
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.rstrip("\n")
