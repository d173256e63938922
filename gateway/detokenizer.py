"""Turns the tokens of one sequence into text as they come. Owns held back text; knows nothing of requests or workers."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from gateway.stop_strings import StopStringFinder

_NUM_CONTEXT_TOKENS = 8
_MAX_SHOWN_IDS = 64


class TextPiece(NamedTuple):
    """Text that became certain with a token, and whether a stop string ended the sequence there."""

    text: str
    stopped: bool = False


class Detokenizer:
    """Text of one sequence. Special tokens have none.

    Args:
        tokenizer: the model's.
        stops: strings that end the text before them.
        context_ids: the prompt; its end decides whether the first token begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._finder = StopStringFinder(stops)
        self._has_stops = bool(stops)
        self._shown_ids = list(context_ids[-_NUM_CONTEXT_TOKENS:])
        self._pending_ids: list[int] = []
        self._stream = self._new_stream()

    def add(self, token_id: int) -> TextPiece:
        """The text that is certain with this token: none while a character is incomplete or a stop string may have begun."""
        self._pending_ids.append(token_id)
        text = self._step(token_id)
        if text is None:
            text = ""
        else:
            self._show_pending()
        if not self._has_stops:
            return TextPiece(text)
        piece = self._finder.add(text)
        return TextPiece(piece, self._finder.found)

    def flush(self) -> str:
        """What was held back, when no more tokens come. Incomplete characters become U+FFFD."""
        text = self._finder.add(self._pending_text()) if self._pending_ids else ""
        self._pending_ids = []
        return text + self._finder.flush()

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception:  # tokenizers raises nothing narrower when a token changes the text before it
            text = self._pending_text()
            self._show_pending()
            self._stream = self._new_stream()
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

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._shown_ids[-_NUM_CONTEXT_TOKENS:], skip_special_tokens=True)
