"""Clients' texts to tokens and back, at a cost that the allowed tokens bound.

Texts that must have too many tokens are refused by their length. Of other texts, ever longer
beginnings are tokenized until one has too many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from gateway.text.chat_renderer import ChatRenderer
from gateway.text.template_source import Message
from gateway.text.text_lanes import TextLanes
from gateway.text.tokenizer import ModelTokenizer
from kvrelay.errors import InvalidRequestError

MIN_BYTES_PER_TOKEN = 64
"""Tokenizers may drop white space, or map unknown text to one token."""
MARGIN_TOKENS = 512
"""A cut word at the end may add tokens."""
FIRST_CHARACTERS_PER_TOKEN = 4
BYTES_PER_TOKEN_ID = 4


@dataclass(frozen=True, slots=True)
class TokenBound:
    field: str
    max_tokens: int
    advice: str
    """Follows "has <length>; "."""

    def error(self, length: str) -> InvalidRequestError:
        return InvalidRequestError(self.field, f"has {length}; {self.advice}")


class Texts:
    def __init__(self, lanes: TextLanes | None = None, renderer: ChatRenderer | None = None) -> None:
        self._lanes = lanes or TextLanes()
        self._renderer = renderer or ChatRenderer()

    async def encode(
        self, tokenizer: ModelTokenizer, text: str, bound: TokenBound, deadline: float, *, rendered: bool = False
    ) -> list[int]:
        """A `rendered` chat already has its special tokens.

        Raises:
            InvalidRequestError: the text has more tokens than the bound allows.
            DeadlineError, OverloadedError: as `TextLanes.run`.
        """
        token_ids: list[int] = []
        for part in tokenizer.control_tokens.cut(text) if rendered else (text,):
            token_ids += await self._encode_part(tokenizer, part, bound, deadline, rendered=rendered)
            if len(token_ids) > bound.max_tokens:
                raise bound.error(f"more than {bound.max_tokens} tokens")
        return token_ids

    async def _encode_part(
        self, tokenizer: ModelTokenizer, text: str, bound: TokenBound, deadline: float, *, rendered: bool
    ) -> list[int]:
        max_bytes = _max_bytes(tokenizer, bound)
        num_bytes = utf8_length(text)
        if num_bytes > max_bytes:
            raise bound.error(f"{num_bytes} bytes, of which at most {max_bytes} are read here")
        for part in _parts(text, bound.max_tokens):
            encode = partial(tokenizer.encode, part, bound.max_tokens, rendered=rendered)
            encoded = await self._lanes.run(utf8_length(part), deadline, encode)
            if len(part) == len(text) and encoded.token_ids is None:
                raise bound.error(f"{encoded.num_tokens} tokens")
            if encoded.num_tokens > bound.max_tokens + MARGIN_TOKENS:
                raise bound.error(f"more than {bound.max_tokens} tokens")
        assert encoded.token_ids is not None, "the last part is the whole text"
        return encoded.token_ids

    async def encode_chat(
        self, tokenizer: ModelTokenizer, messages: Sequence[Message], field: str, bound: TokenBound, deadline: float
    ) -> list[int]:
        rendered = await self.render(tokenizer, messages, field, bound, deadline)
        return await self.encode(tokenizer, rendered, bound, deadline, rendered=True)

    async def render(
        self, tokenizer: ModelTokenizer, messages: Sequence[Message], field: str, bound: TokenBound, deadline: float
    ) -> str:
        """For `encode` with `rendered`; see `ControlTokens` for what is in it besides the text.

        Raises as `encode`, `ModelTokenizer.require_template`, `ControlTokens.mark` and
        `ChatRenderer.render`.
        """
        template = tokenizer.require_template()
        num_bytes, max_bytes = (
            sum(utf8_length(message["content"]) for message in messages),
            _max_bytes(tokenizer, bound),
        )
        if num_bytes > max_bytes:
            raise bound.error(f"{num_bytes} bytes in its messages, of which at most {max_bytes} are read here")
        mark = partial(tokenizer.control_tokens.mark, messages, field)
        marked = await self._lanes.run(num_bytes, deadline, mark)
        return await self._renderer.render(template, marked, field, deadline)

    async def has_chat_template(self, tokenizer: ModelTokenizer) -> bool:
        """Compiles it once. Raises as `ChatRenderer.problem_of`."""
        template = tokenizer.template
        return template is not None and await self._renderer.problem_of(template) is None

    async def decode(
        self, tokenizer: ModelTokenizer, token_ids: Sequence[int], deadline: float, *, keep_special_tokens: bool = False
    ) -> str:
        """The caller bounds the number of tokens."""
        decode = partial(tokenizer.decode, token_ids, keep_special_tokens=keep_special_tokens)
        return await self._lanes.run(len(token_ids) * BYTES_PER_TOKEN_ID, deadline, decode)


def _max_bytes(tokenizer: ModelTokenizer, bound: TokenBound) -> int:
    return bound.max_tokens * max(tokenizer.longest_token_bytes, MIN_BYTES_PER_TOKEN)


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _parts(text: str, max_tokens: int) -> Iterator[str]:
    size = (max_tokens + MARGIN_TOKENS) * FIRST_CHARACTERS_PER_TOKEN
    while size * 2 < len(text):
        yield text[:size]
        size *= 2
    yield text
