"""Turns the tokens of one sequence into text as they come."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from gateway.text.stop_strings import StopStringFinder
from gateway.text.token_text import TokenTexts

_MAX_LOOKED_AT = 256
_LONGEST_CHARACTER = 4
_NUM_CONTEXT_TOKENS = 8
_MAX_SHOWN_IDS = 64


class TextPiece(NamedTuple):
    text: str
    stopped: bool = False


class Detokenizer:
    """Text of one sequence, without its prompt's and without special tokens.

    An incomplete character waits for its other tokens; an invalid one is U+FFFD at once. The first
    text completes a character that the prompt began.

    Args:
        context_ids: the prompt; its end decides whether the first token begins with a space.
        emitted_ids: tokens whose text the client has already.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | TokenTexts,
        stops: Sequence[str] = (),
        context_ids: Sequence[int] = (),
        emitted_ids: Sequence[int] = (),
    ) -> None:
        texts = tokenizer if isinstance(tokenizer, TokenTexts) else TokenTexts(tokenizer)
        self._finder = StopStringFinder(stops)
        self._has_stops = bool(stops)
        self._stream: _Stream = (
            _ByteStream(texts, context_ids) if texts.are_known else _WindowStream(texts, context_ids)
        )
        for token_id in emitted_ids:
            self.add(token_id)

    def add(self, token_id: int) -> TextPiece:
        text = self._stream.add(token_id)
        if not self._has_stops:
            return TextPiece(text)
        piece = self._finder.add(text)
        return TextPiece(piece, self._finder.found)

    def flush(self) -> str:
        """Incomplete characters become U+FFFD."""
        return self._finder.add(self._stream.flush()) + self._finder.flush()


class _Stream(Protocol):
    def add(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _ByteStream:
    """For tokenizers whose tokens have bytes of their own."""

    def __init__(self, texts: TokenTexts, context_ids: Sequence[int]) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")(texts.errors)
        end = _end_of(texts, context_ids)
        self._is_first = end is None
        self._completed = _CompletedCharacter(end or b"", texts.errors)

    def add(self, token_id: int) -> str:
        piece = self._texts.of(token_id, is_first=self._is_first)
        if piece is None:
            return ""
        self._is_first = False
        if self._completed.is_pending:
            text, piece = self._completed.add(piece)
            return text + self._decoder.decode(piece)
        return self._decoder.decode(piece)

    def flush(self) -> str:
        return self._completed.flush() + self._decoder.decode(b"", final=True)


class _CompletedCharacter:
    """A character that the prompt began and the output may complete.

    If not, it has no text, because the prompt's end already reads as U+FFFD.
    """

    def __init__(self, end: bytes, errors: str) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(end)
        begun, _ = decoder.getstate()
        self.is_pending = bool(begun)
        self._errors = errors
        self._taken = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._decoder.decode(begun)

    def add(self, piece: bytes) -> tuple[str, bytes]:
        """Returns the character, and the bytes after it."""
        for position in range(len(piece)):
            try:
                character = self._decoder.decode(piece[position : position + 1])
            except UnicodeDecodeError:
                return self.flush(), piece[position:]
            if character:
                self.is_pending = False
                return character, piece[position + 1 :]
            self._taken += piece[position : position + 1]
        return "", b""

    def flush(self) -> str:
        taken, self._taken, self.is_pending = self._taken, b"", False
        return "" if self._errors == "replace" else "\ufffd" * len(taken)


def _end_of(texts: TokenTexts, token_ids: Sequence[int]) -> bytes | None:
    """None if no token has text."""
    end: bytes | None = None if len(token_ids) <= _MAX_LOOKED_AT else b""
    for token_id in reversed(token_ids[-_MAX_LOOKED_AT:]):
        piece = texts.of(token_id)
        if piece is not None:
            end = piece + (end or b"")
            if len(end) >= _LONGEST_CHARACTER:
                break
    return end


class _WindowStream:
    """For decoders that need context: decodes the last few tokens again with each new one."""

    def __init__(self, texts: TokenTexts, context_ids: Sequence[int]) -> None:
        self._tokenizer = texts.tokenizer
        self._max_pending = _LONGEST_CHARACTER if texts.may_split_characters else 1
        self._shown_ids = list(context_ids[-_NUM_CONTEXT_TOKENS:])
        self._pending_ids: list[int] = []

    def add(self, token_id: int) -> str:
        self._pending_ids.append(token_id)
        text = self._pending_text()
        if text.endswith("\ufffd") and len(self._pending_ids) < self._max_pending:
            return ""
        self._show_pending()
        return text

    def flush(self) -> str:
        text = self._pending_text() if self._pending_ids else ""
        self._pending_ids.clear()
        return text

    def _show_pending(self) -> None:
        self._shown_ids += self._pending_ids
        self._pending_ids.clear()
        if len(self._shown_ids) > _MAX_SHOWN_IDS:
            del self._shown_ids[:-_NUM_CONTEXT_TOKENS]

    def _pending_text(self) -> str:
        before = self._decode(self._shown_ids)
        return self._decode(self._shown_ids + self._pending_ids)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
