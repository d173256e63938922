"""Renders chats in a confined child: see `kvrelay.runtime.confined_main`."""

import json
from functools import lru_cache

from gateway.text.chat_template import ChatTemplate
from kvrelay.errors import InvalidRequestError, PreconditionError

RENDERED, REFUSED, BROKEN = b"t", b"r", b"b"
"""Before the text; before what is wrong with the messages, or with the template."""
MAX_TEMPLATES = 8


def prepare() -> None:
    ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}", {}).render([])


def answer(request: bytes) -> bytes:
    """`{"source", "special_tokens", "messages" or null, "max_characters"}` in, a kind and text out."""
    asked = json.loads(request)
    try:
        template = _compiled(asked["source"], json.dumps(asked["special_tokens"]))
    except PreconditionError as error:
        return BROKEN + error.message.encode("utf-8", "replace")
    if asked["messages"] is None:
        return RENDERED
    try:
        text = template.render(asked["messages"])
    except InvalidRequestError as error:
        return REFUSED + error.problem.encode("utf-8", "replace")
    if len(text) > asked["max_characters"]:
        problem = f"become {len(text)} characters by the model's chat template, too many for what they say"
        return REFUSED + problem.encode()
    return RENDERED + text.encode("utf-8", "replace")


@lru_cache(MAX_TEMPLATES)
def _compiled(source: str, special_tokens: str) -> ChatTemplate:
    return ChatTemplate(source, json.loads(special_tokens))
