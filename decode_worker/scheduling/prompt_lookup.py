"""Guesses a sequence's next tokens from an earlier occurrence of its last ones. Pure.

    token_ids   ... [the cat sat] on the mat ... [the cat sat]
                     ^ longest of the latest matches           -> guess: on the mat ...

Prompt lookup decoding (Saxena 2023), with chains as in deflate (RFC 1951): about 100 bytes per
token, and a bounded number of comparisons per lookup.
"""

from array import array
from collections.abc import Sequence

MIN_MATCH_TOKENS = 2
MAX_MATCH_TOKENS = 8
"""Tokens compared per match. The latest full match wins."""
MAX_CANDIDATES = 8
"""Earlier places compared."""
MAX_INDEXED_AT_ONCE = 1024
"""Per step, so that no step waits for a long prompt."""

_NOWHERE = 0  # no match ends at position 0: it would be shorter than MIN_MATCH_TOKENS


class PromptLookup:
    """Indexes one sequence, which may only grow at its end."""

    def __init__(self) -> None:
        self._last_by_pair: dict[int, int] = {}
        """Last position of two tokens, packed into one number."""
        self._earlier = array("I", [_NOWHERE])
        """By position: where its last two tokens stood before."""

    def propose(self, token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Empty without a match. A guess that reaches the end continues with its own start."""
        self._index(token_ids)
        num_tokens = len(token_ids)
        if max_tokens <= 0 or len(self._earlier) < num_tokens:
            return ()
        begin = self._longest_match(token_ids) + 1
        if begin == _NOWHERE + 1:
            return ()
        guess = list(token_ids[begin : begin + max_tokens])
        while len(guess) < max_tokens:
            guess.append(guess[len(guess) - (num_tokens - begin)])
        return tuple(guess)

    def _index(self, token_ids: Sequence[int]) -> None:
        begin = len(self._earlier)
        last_by_pair, earlier = self._last_by_pair, self._earlier
        for position in range(begin, min(len(token_ids), begin + MAX_INDEXED_AT_ONCE)):
            pair = token_ids[position - 1] << 32 | token_ids[position]
            earlier.append(last_by_pair.get(pair, _NOWHERE))
            last_by_pair[pair] = position

    def _longest_match(self, token_ids: Sequence[int]) -> int:
        """Its last position, else _NOWHERE."""
        end = len(token_ids) - 1
        best, best_length = _NOWHERE, 0
        candidate = self._earlier[end]
        for _ in range(MAX_CANDIDATES):
            if candidate == _NOWHERE:
                break
            length = _match_length(token_ids, candidate, end)
            if length > best_length:
                best, best_length = candidate, length
            if length == MAX_MATCH_TOKENS:
                break
            candidate = self._earlier[candidate]
        return best


def _match_length(token_ids: Sequence[int], candidate: int, end: int) -> int:
    """2 to MAX_MATCH_TOKENS."""
    length = MIN_MATCH_TOKENS
    while (
        length < MAX_MATCH_TOKENS and length <= candidate and token_ids[candidate - length] == token_ids[end - length]
    ):
        length += 1
    return length
