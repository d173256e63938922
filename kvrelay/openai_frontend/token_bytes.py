"""Bytes of partial-character tokens, in the log probabilities of OpenAI's API. Pure.

smg decodes each token alone, so a part of a character becomes U+FFFD. Here a character's last token
gets all its bytes. So the joined bytes are the text, as OpenAI's reference promises.
"""

from typing import Any

_REPLACEMENT = "\ufffd"

Entry = dict[str, Any]


def mend_entries(entries: list[Entry], text: str) -> None:
    """Corrects `token` and `bytes` in place. `text` may lack an incomplete character at its end."""
    rest = text.encode("utf-8", "replace")
    number = 0
    while number < len(entries):
        if _is_whole(entries[number]):
            rest = rest.removeprefix(bytes(entries[number]["bytes"]))
            number += 1
            continue
        end = number
        while end < len(entries) and not _is_whole(entries[end]):
            end += 1
        found = _bytes_before(rest, entries[end:], num_partial=end - number)
        rest = rest[len(found) :]
        _assign_bytes(entries[number:end], found)
        number = end
    for entry in entries:
        for top in entry.get("top_logprobs") or ():
            if not _is_whole(top):
                top["bytes"] = None  # not chosen, so the text does not have it


def _is_whole(entry: Entry) -> bool:
    return _REPLACEMENT not in str(entry.get("token")) and isinstance(entry.get("bytes"), list)


def _bytes_before(rest: bytes, following: list[Entry], num_partial: int) -> bytes:
    """The bytes of `num_partial` tokens, which stand before `following`.

    The text may repeat `following`. So each token gets at least one byte, and as few as possible;
    if only whole entries follow, they are the end of the text.
    """
    if not following:
        return rest
    leading = _leading_whole(following)
    whole = b"".join(bytes(entry["bytes"]) for entry in leading)
    if len(leading) == len(following) and rest.endswith(whole):
        return rest[: len(rest) - len(whole)]
    return rest[: max(rest.find(whole, num_partial), 0)]


def _leading_whole(entries: list[Entry]) -> list[Entry]:
    end = next((number for number, entry in enumerate(entries) if not _is_whole(entry)), len(entries))
    return entries[:end]


def _assign_bytes(run: list[Entry], found: bytes) -> None:
    """Gives a character's bytes to the last token that it may be made of."""
    characters = list(found.decode("utf-8", "replace"))
    for entry in run:
        entry["token"], entry["bytes"] = "", []
    # Which token ends which character is unknown: from the end, each takes one, the first the rest.
    for entry in reversed(run):
        if not characters:
            return
        taken = characters.pop() if entry is not run[0] else "".join(characters)
        entry["token"], entry["bytes"] = taken, list(taken.encode())
