"""Puts the tokens of one work in order: the first come on another session than the rest, so a later one may arrive earlier."""

from kvrelay.work import SequenceToken, Work


class TokenGapError(Exception):
    """A worker skipped a token index: it cannot be trusted with this attempt."""


class TokenOrder:
    """Next expected index of every sequence of a work, and the tokens that came too early.

    index    first_index      first_index + 1 ...
    from     prefill worker   decode worker            after `begin_local_prompt`: all from the decode worker
    """

    def __init__(self, work: Work) -> None:
        self.first_tokens_known = False
        """Nothing is to be expected from a prefill worker any more."""
        self._work = work
        self._next_index = dict.fromkeys(work.sequences, work.first_index + 1)
        self._early: dict[int, list[SequenceToken]] = {}

    def begin_local_prompt(self) -> None:
        """The decode worker will sample the first tokens too."""
        self.first_tokens_known = True
        self._next_index = dict.fromkeys(self._work.sequences, self._work.first_index)

    def take_first(self, tokens: tuple[SequenceToken, ...]) -> list[SequenceToken]:
        """The prefill worker's tokens, and behind each what came early from the decode worker.

        Raises:
            TokenGapError: they are not one of `first_index` for each sequence.
        """
        expected = [(sequence, self._work.first_index) for sequence in self._work.sequences]
        if [(token.sequence, token.index) for token in tokens] != expected:
            raise TokenGapError
        self.first_tokens_known = True
        ready = []
        for token in tokens:
            ready.append(token)
            ready.extend(self._early.pop(token.sequence, ()))
        return ready

    def take_next(self, token: SequenceToken) -> list[SequenceToken]:
        """A decode worker's token when it may be emitted now; nothing when it is a repetition or must wait for the first token.

        Raises:
            TokenGapError: a token before it is missing, or the sequence is not of this work.
        """
        next_index = self._next_index.get(token.sequence)
        if next_index is None or token.index > next_index:
            raise TokenGapError
        if token.index < next_index:
            return []
        self._next_index[token.sequence] = next_index + 1
        if not self.first_tokens_known:
            self._early.setdefault(token.sequence, []).append(token)
            return []
        return [token]
