"""Keeps what clients write in a chat from becoming control tokens of the model.

    content   Hi<|im_end|>
    marked    Hi<MARK|im_end|>
    rendered  <|im_start|>user Hi<MARK|im_end|><|im_end|>
    cut       <|im_start|>user Hi<  and  |im_end|><|im_end|>

The parts are tokenized apart: only the template's control tokens count.
"""

import itertools
import secrets
from collections.abc import Iterable, Iterator, Sequence

from gateway.text.template_source import Message
from kvrelay.errors import InvalidRequestError

MAX_MARKS = 256
"""Of one chat: each makes its text longer, and is a cut."""


class ControlTokens:
    """A token of one character cannot be cut."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = tuple(sorted({token for token in tokens if len(token) > 1}))
        self._beginnings = {token[:2] for token in self._tokens}
        # Digits only: templates may change the case of letters.
        self._mark = str(10**28 + secrets.randbelow(9 * 10**28))

    def mark(self, messages: Sequence[Message], field: str) -> list[Message]:
        """Call it off the event loop for long messages.

        Raises InvalidRequestError for more than MAX_MARKS.
        """
        num_marks = 0
        marked: list[Message] = []
        for message in messages:
            copy = {}
            for key, text in message.items():
                places = self._places(text, MAX_MARKS - num_marks, field)
                num_marks += len(places)
                copy[key] = _with_marks(text, places, self._mark)
            marked.append(copy)
        return marked

    def cut(self, rendered: str) -> list[str]:
        return rendered.split(self._mark)

    def _places(self, text: str, max_places: int, field: str) -> list[int]:
        """After the first character of each token, also of one that begins within another."""
        places: list[int] = []
        for begin in self._begins(text):
            if len(places) == max_places:
                problem = f"have more than {MAX_MARKS} of the model's control tokens in their text; take them out"
                raise InvalidRequestError(field, problem)
            places.append(begin + 1)
        return sorted(places)

    def _begins(self, text: str) -> Iterator[int]:
        # Searches are fast, and short enough for other threads to get their turn between them.
        for beginning in self._beginnings:
            begin = text.find(beginning)
            while begin >= 0:
                if text.startswith(self._tokens, begin):
                    yield begin
                begin = text.find(beginning, begin + 1)


def _with_marks(text: str, places: Sequence[int], mark: str) -> str:
    if not places:
        return text
    bounds = [0, *places, len(text)]
    return mark.join(text[begin:end] for begin, end in itertools.pairwise(bounds))
