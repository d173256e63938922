"""Small commands: cancel, tokenize, detokenize, protos, version."""

import shutil
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import kvrelay
from kvrelay.cli.client_session import open_client
from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.standard_input import text_or_standard_input
from kvrelay.cli.views.output import print_json
from kvrelay.config.settings import ClientSettings
from kvrelay.config.sources import SettingsSources
from kvrelay.errors import ConfigError
from kvrelay.own_packages import protos_folder

Model = Annotated[str, Option("--model", help="Model; not needed when only one is served.", show_default=False)]
Json = Annotated[bool, Option("--json", help="JSON, for programs.")]


@takes_settings(ClientSettings)
def cancel(
    sources: SettingsSources,
    request_id: Annotated[str, Argument(help="The request, as in `kvrelay requests`.")],
    json: Json = False,
) -> None:
    """End a running request."""
    with open_client(sources) as client:
        state = client.cancel(request_id)
    if json:
        print_json({"request_id": request_id, "state": state})
    else:
        print(f"{request_id} {state.value}")


@takes_settings(ClientSettings)
def tokenize(
    sources: SettingsSources,
    text: Annotated[
        str | None,
        Argument(help="What to tokenize. Without one, or with -, it is read from standard input.", show_default=False),
    ] = None,
    model: Model = "",
    json: Json = False,
) -> None:
    """Show a text's token ids."""
    text = text_or_standard_input(text, "text")
    with open_client(sources) as client:
        token_ids = client.tokenize(text, model=model)
    if json:
        print_json({"token_ids": token_ids})
    else:
        print(*token_ids)


@takes_settings(ClientSettings)
def detokenize(
    sources: SettingsSources,
    token_ids: Annotated[list[int], Argument(help="Token ids.")],
    model: Model = "",
    keep_special_tokens: Annotated[bool, Option("--keep-special-tokens", help="Leave special tokens in.")] = False,
    json: Json = False,
) -> None:
    """Show the text of token ids."""
    with open_client(sources) as client:
        text = client.detokenize(token_ids, model=model, keep_special_tokens=keep_special_tokens)
    if json:
        print_json({"text": text})
    else:
        print(text)


def protos(
    to: Annotated[
        Path | None, Option("--to", metavar="FOLDER", help="Copy them there, by the paths of their imports.")
    ] = None,
) -> None:
    """Show the folder of the protocol's .proto files, from which other languages generate their
    stubs.
    """
    folder = protos_folder()
    if to is None:
        print(folder)
        return
    copied = [path.relative_to(folder) for path in sorted(folder.rglob("*.proto"))]
    try:
        for path in copied:
            (to / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, to / path)
    except OSError as error:
        raise ConfigError(f"--to {to}: {error.strerror}; name a folder that can be written") from None
    print(*(to / path for path in copied), sep="\n")


def version() -> None:
    """Show the version; as --version and -V."""
    print(kvrelay.__version__)
