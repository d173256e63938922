"""Small commands: cancel, tokenize, detokenize, version."""

from typing import Annotated

from typer import Argument, Option

import kvrelay
from kvrelay.cli.client_session import open_client
from kvrelay.cli.output import print_json
from kvrelay.cli.setting_options import takes_settings
from kvrelay.config import ClientSettings
from kvrelay.settings_sources import SettingsSources

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
    text: Annotated[str, Argument(help="What to tokenize.")],
    model: Model = "",
    json: Json = False,
) -> None:
    """Show a text's token ids."""
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


def version() -> None:
    """Show the version."""
    print(kvrelay.__version__)
