"""Guesses: what they are, how many, and what they cost."""

from hypothesis import given
from hypothesis import strategies as st

from decode_worker.scheduling import drafting, prompt_lookup
from decode_worker.scheduling.drafting import DraftLength
from decode_worker.scheduling.prompt_lookup import MAX_CANDIDATES, MAX_INDEXED_AT_ONCE, MAX_MATCH_TOKENS, PromptLookup


def match_length(tokens: list[int], end: int) -> int:
    """How many tokens up to `end` equal the last ones of all."""
    length = 0
    while length <= end and length < MAX_MATCH_TOKENS and tokens[end - length] == tokens[len(tokens) - 1 - length]:
        length += 1
    return length


def expected_guess(tokens: list[int], max_tokens: int) -> list[int]:
    """The same by looking everywhere."""
    ends = [end for end in range(len(tokens) - 2, 0, -1) if match_length(tokens, end) >= 2][:MAX_CANDIDATES]
    if not ends:
        return []
    best = max(ends, key=lambda end: (match_length(tokens, end), end))
    extended = list(tokens)
    for number in range(max_tokens):
        extended.append(extended[best + 1 + number])
    return extended[len(tokens) :]


@given(tokens=st.lists(st.integers(0, 2), max_size=60), max_tokens=st.integers(1, 9), data=st.data())
def test_a_guess_is_what_followed_the_longest_of_the_latest_matches(
    tokens: list[int], max_tokens: int, data: st.DataObject
) -> None:
    lookup = PromptLookup()
    end = 0
    while end < len(tokens):
        end = data.draw(st.integers(end + 1, len(tokens)))
        assert list(lookup.propose(tokens[:end], max_tokens)) == expected_guess(tokens[:end], max_tokens)


def test_a_repetition_is_continued_beyond_its_end() -> None:
    assert PromptLookup().propose([9, 1, 2, 3, 1, 2, 3, 1, 2], 7) == (3, 1, 2, 3, 1, 2, 3)
    assert PromptLookup().propose([5, 5, 5], 4) == (5, 5, 5, 5)


def test_the_longest_match_wins_over_a_later_one() -> None:
    assert PromptLookup().propose([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3], 1) == (7,)


def test_without_a_match_or_a_wish_nothing_is_guessed() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3, 4], 4) == ()
    assert lookup.propose([1, 2, 3, 4, 1, 2], 0) == ()
    assert lookup.propose([1, 2, 3, 4, 1, 2], -3) == ()
    assert lookup.propose([1, 2, 3, 4, 1, 2], 2) == (3, 4)


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    tokens = [*range(MAX_INDEXED_AT_ONCE + 100), 50, 51]
    lookup = PromptLookup()
    assert lookup.propose(tokens, 2) == ()
    assert lookup.propose(tokens, 2) == (52, 53)


def test_the_index_has_one_entry_per_token() -> None:
    tokens = [number * number % 97 for number in range(500)]
    lookup = PromptLookup()
    for end in range(1, len(tokens)):
        lookup.propose(tokens[:end], 4)
    assert len(lookup._earlier) == len(tokens) - 1
    assert len(lookup._last_by_pair) <= len(tokens)


class TestDraftLength:
    def test_grows_while_all_is_right_and_shrinks_to_what_was(self) -> None:
        length = DraftLength(10)
        assert length.next_step() == drafting.FIRST_LENGTH
        length.on_verified(4, 4)
        assert length.next_step() == 8
        length.on_verified(8, 8)
        assert length.next_step() == 10
        length.on_verified(2, 2)
        assert length.next_step() == 10, "fewer were drafted for want of room"
        length.on_verified(10, 3)
        assert length.next_step() == 4

    def test_pauses_after_misses_and_longer_every_time(self) -> None:
        length = DraftLength(8)
        pauses = []
        for _ in range(12):
            waited = 0
            while (wanted := length.next_step()) == 0:
                waited += 1
            pauses.append(waited)
            length.on_verified(wanted, 0)
        assert pauses[: drafting.MISSES_BEFORE_PAUSE] == [0] * drafting.MISSES_BEFORE_PAUSE
        assert pauses[2:5] == [8, 16, 32]
        assert pauses[-1] == drafting.MAX_PAUSE_STEPS

    def test_comes_back_when_a_guess_is_right(self) -> None:
        length = DraftLength(8)
        length.on_verified(4, 0)
        length.on_verified(1, 0)
        assert [length.next_step() for _ in range(9)] == [0] * 8 + [1]
        length.on_verified(1, 1)
        assert length.next_step() == 2
        length.on_verified(2, 2)
        assert length.next_step() == 4

    def test_only_tries_now_and_then_where_so_few_right_ones_do_not_pay(self) -> None:
        length = DraftLength(8)
        for _ in range(8):
            length.on_verified(length.next_step(), 1)
        wanted = [length.next_step(least_share=0.9) for _ in range(2 * drafting.TRIAL_PAUSE_STEPS + 2)]
        assert wanted == 2 * [1, *[0] * drafting.TRIAL_PAUSE_STEPS]
        assert length.next_step(least_share=0.2) > 1


def test_lookups_are_bounded() -> None:
    """However often the end stood before: a sequence of one token is the worst."""
    comparisons = 0
    real = prompt_lookup._match_length

    def counted(*arguments: object) -> int:
        nonlocal comparisons
        comparisons += 1
        return real(*arguments)  # type: ignore[arg-type]

    prompt_lookup._match_length = counted  # type: ignore[assignment]
    try:
        tokens = [1, 2, 3, 4] * 200 + [9, 2, 3]
        lookup = PromptLookup()
        lookup.propose(tokens, 4)
    finally:
        prompt_lookup._match_length = real
    assert 0 < comparisons <= MAX_CANDIDATES
