"""The bytes of each token's text.

Most tokenizers split characters among tokens: byte-level ones write bytes as characters, others
have tokens such as `<0xE2>`.
"""

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

_PIECE_DECODERS = frozenset({"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})
"""A token's text depends on no other token, except for a first token's space."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE = "kvrelay-each-byte"

codecs.register_error(_EACH_BYTE, lambda failure: ("\ufffd" * (failure.end - failure.start), failure.end))  # type: ignore[attr-defined]


class TokenTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoders = list(_decoders(tokenizer))
        types = {decoder["type"] for decoder in decoders}
        self._is_byte_level = types == {"ByteLevel"}
        self.may_split_characters = bool(types & {"ByteLevel", "ByteFallback"})
        self.errors = "replace" if self._is_byte_level else _EACH_BYTE
        """A U+FFFD for each begun character, or for each byte."""
        self._special_ids = {
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._anchor = self._find_anchor() if _is_by_piece(decoders) else None
        self._pieces: dict[int, bytes | None] = {}
        self._first_pieces: dict[int, bytes | None] = {}

    @property
    def are_known(self) -> bool:
        """Whether tokens have bytes of their own."""
        return self._is_byte_level or self._anchor is not None

    def of(self, token_id: int, *, is_first: bool = False) -> bytes | None:
        """None for special tokens and unknown ids. `is_first`: no text precedes the token."""
        known = self._first_pieces if is_first else self._pieces
        try:
            return known[token_id]
        except KeyError:
            piece = known[token_id] = self._find(token_id, is_first)
            return piece

    def _find(self, token_id: int, is_first: bool) -> bytes | None:
        token = self.tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return None
        if self._is_byte_level:
            return self._byte_level(token_id, token)
        byte = _BYTE_TOKEN.fullmatch(token) if self.may_split_characters else None
        if byte is not None and int(byte[1], 16) >= 0x80:
            return bytes.fromhex(byte[1])
        if is_first or self._anchor is None:
            return self._decode(token_id).encode()
        before, both = self._decode(self._anchor), self._decode(self._anchor, token_id)
        return (both.removeprefix(before) if both.startswith(before) else self._decode(token_id)).encode()

    def _byte_level(self, token_id: int, token: str) -> bytes:
        text = self._decode(token_id)
        try:
            piece = bytes(_BYTES[character] for character in token)
        except KeyError:  # an added token, written literally
            return text.encode()
        return piece if piece.decode(errors="replace") == text else text.encode()

    def _decode(self, *token_ids: int) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _find_anchor(self) -> int | None:
        """A token after which others read as in the middle of a sequence."""
        for token_id in range(self.tokenizer.get_vocab_size(with_added_tokens=False)):
            text = self._decode(token_id)
            if (
                token_id not in self._special_ids
                and text.isalpha()
                and self._decode(token_id, token_id).startswith(text)
            ):
                return token_id
        return None


def _decoders(tokenizer: Tokenizer) -> Iterable[dict[str, Any]]:
    if tokenizer.decoder is None:
        return
    decoder = json.loads(tokenizer.decoder.__getstate__())
    yield from decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_by_piece(decoders: list[dict[str, Any]]) -> bool:
    for decoder in decoders:
        if decoder["type"] not in _PIECE_DECODERS or decoder.get("stop"):
            return False
        if decoder["type"] == "Replace" and len(decoder["pattern"].get("String", "")) != 1:
            return False
    return bool(decoders)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's map of bytes to characters: visible ones stay, the rest go to 256 and on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(unseen)}


_BYTES = _bytes_of_characters()
