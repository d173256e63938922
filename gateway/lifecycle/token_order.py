"""Puts a job's tokens in order, which come over two sessions. Pure."""

from kvrelay.core.job import Job, SequenceToken


class TokenGapError(Exception):
    """A worker skipped a token index."""


class TokenOrder:
    """Next index of each sequence, and tokens that came early.

    index    first_index      first_index + 1 ...
    from     prefill worker   decode worker           (local prefill: all)
    """

    def __init__(self, job: Job) -> None:
        self.first_tokens_known = False
        self._job = job
        self._next_index = dict.fromkeys(job.sequences, job.first_index + 1)
        self._early: dict[int, list[SequenceToken]] = {}

    def start_local_prefill(self) -> None:
        self.first_tokens_known = True
        self._next_index = dict.fromkeys(self._job.sequences, self._job.first_index)

    def take_first(self, tokens: tuple[SequenceToken, ...]) -> list[SequenceToken]:
        """Returns the tokens, each followed by its early successors.

        Raises:
            TokenGapError: they are not `first_index` of each sequence.
        """
        expected = [(sequence, self._job.first_index) for sequence in self._job.sequences]
        if [(token.sequence, token.index) for token in tokens] != expected:
            raise TokenGapError
        self.first_tokens_known = True
        ready = []
        for token in tokens:
            ready.append(token)
            ready.extend(self._early.pop(token.sequence, ()))
        return ready

    def take_next(self, token: SequenceToken) -> list[SequenceToken]:
        """Returns the token if it is new and first tokens are known.

        Raises:
            TokenGapError: an earlier token is missing.
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
