"""Guesses a sequence's next tokens by looking up where it said the same before. Pure; knows nothing of models and of steps.

Prompt lookup decoding (Saxena 2023): the last few tokens are looked for earlier in prompt and output, and what followed them
there is the guess. Summaries, code edits and answers that quote their prompt repeat it at length.

    token_ids   ... [the cat sat] on the mat ... [the cat sat]
                     ^ longest of the latest matches           -> guess: on the mat ...

Candidates are found as in deflate (RFC 1951): a table from the last two tokens to where they stood last, and for every position a
link to where its own two stood before. So a token costs one entry of each, about 100 bytes, and a lookup a bounded number of
comparisons.
"""

from array import array
from collections.abc import Sequence

MIN_MATCH_TOKENS = 2
"""A single token in common says next to nothing about the next one."""
MAX_MATCH_TOKENS = 8
"""Matches are compared so far back; of those that agree all the way, the latest is taken."""
MAX_CANDIDATES = 8
"""So many earlier places are compared, latest first."""
MAX_INDEXED_AT_ONCE = 1024
"""A longer prompt is indexed over several steps, so that no step waits for it; until then nothing is guessed."""

_NOWHERE = 0  # no match ends at position 0: it would be shorter than MIN_MATCH_TOKENS


class PromptLookup:
    """The index over one sequence's tokens, which may only grow at their end."""

    def __init__(self) -> None:
        self._last_by_pair: dict[int, int] = {}
        """Last two tokens, as one number, to the position of the second of them where they stood last."""
        self._earlier = array("I", [_NOWHERE])
        """For each indexed position, where its last two tokens stood before."""

    def propose(self, token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """The guess for what follows `token_ids`; nothing when there is no match.

        Args:
            token_ids: the sequence's tokens: those of the last call, and more behind them.
            max_tokens: most tokens to guess. A guess that runs into the end goes on with its own start: it is a repetition.
        """
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
        """Last position of the longest earlier match of the sequence's end; _NOWHERE when there is none."""
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
    """How many tokens up to `candidate` and up to `end` are the same, of MAX_MATCH_TOKENS; the last two are."""
    length = MIN_MATCH_TOKENS
    while length < MAX_MATCH_TOKENS and length <= candidate and token_ids[candidate - length] == token_ids[end - length]:
        length += 1
    return length
